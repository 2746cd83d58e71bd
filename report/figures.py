"""The figures of a report, by matplotlib. Each function returns a `Figure`."""

import io
import itertools
import warnings

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from evidence.intervals import mean_interval
from evidence.search_state import WINDOW, changes, early_stop, genes, skip_connections
from models.choices import PRIMITIVES
from models.spaces import space_of

GREY = mpl.colormaps["tab10"](7)
COLOURS = [mpl.colormaps["tab10"](i) for i in range(10) if i != 7]  # all but grey
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))]
MAX_NAMED_CLASSES = 20  # on the axes of a confusion matrix


def to_svg(figure):
    """The bytes of the figure as SVG. Text is not converted to paths, so a browser shows characters of any script."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def printable(name, length=24):
    """A class name for a figure: shortened, with unprintable characters and `$` (mathematics in matplotlib) escaped."""
    short = name if len(name) <= length else name[: length - 1] + "…"
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
    return escaped.replace("$", r"\$")


def epoch_axis(axes):
    """Set ticks at whole epochs, and a grid."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(alpha=0.3)


def curves(run):
    """Loss and top-1 accuracy by epoch, on the training images and on the validation, test or held-out images.

    run: a `RecordedRun`.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, quantity, title, scale in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top 1, %"), (1, 100)):
        for phase, label in (("train", "training"), (run.measured_on, run.measured_on)):
            values = scale * run.by_epoch(f"{phase}/{quantity}")
            axes.plot(list(run.steps), values, label=label, marker="." if len(values) < 30 else None)
        axes.set(xlabel="epoch", title=title)
        epoch_axis(axes)
        axes.legend()
    return figure


# Figures of a search.


def line_styles(candidates):
    """A colour and a dash pattern for each candidate: 36 combinations, and grey for `none`.

    An operation of DARTS's search space has the same style in every run.
    """
    names = [name for name in dict.fromkeys([*PRIMITIVES, *candidates]) if name != "none"]
    styles = dict(zip(names, itertools.cycle(cycler(linestyle=DASHES) * cycler(color=COLOURS))))
    return {name: styles.get(name, {"color": GREY}) for name in candidates}


def edge_weights(run, kind):
    """Weights by epoch: a panel for each edge (row: node, column: source) with a line for each candidate.

    run: a `RecordedRun`; kind: a kind of cell.
    """
    weights, candidates, space = run.edge_weights(kind), run.candidates, run.space
    n_nodes, n_sources = len(weights), space.n_inputs + len(weights) - 1
    width = 1.75 * n_sources
    columns = max(1, int(width / (0.7 + 0.07 * max(map(len, candidates)))))
    legend_rows = -(-len(candidates) // columns)
    figure = Figure(figsize=(width, 1.5 * n_nodes + 0.5 + 0.18 * legend_rows), layout="constrained")
    panels = figure.subplots(n_nodes, n_sources, sharex=True, sharey=True, squeeze=False)
    for node, row in enumerate(panels):
        row[0].set_ylabel(f"node {node}", fontsize=8)
        for source, axes in enumerate(row):
            if source < space.n_inputs + node:
                choosable = space.choosable(candidates)
                draw_edge(axes, weights[node][source], candidates, choosable, space.state_name(source))
            else:
                axes.set_axis_off()
    for axes in panels[-1]:
        axes.set_xlabel("epoch", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3)
    return figure


def draw_edge(axes, weights, candidates, choosable, source):
    """One edge's weights by epoch; the title names the source and the strongest candidate that can be chosen."""
    epochs = range(1, len(weights) + 1)
    marker = "." if len(weights) == 1 else None  # a line with a single point is invisible
    for name, style in line_styles(candidates).items():
        axes.plot(epochs, weights[:, candidates.index(name)], lw=1.4, label=name, marker=marker, **style)
    last = {name: weight for name, weight in zip(candidates, weights[-1]) if name in choosable}
    axes.set_title(f"{source}: {max(last, key=last.get)}", fontsize=7.5)
    axes.tick_params(labelsize=7)
    epoch_axis(axes)


def margins_and_changes(genotypes, history):
    """Margins of the chosen operations, skip connections and changes of the cell, and the eigenvalue, by epoch.

    genotypes, history: of the search, by epoch; see `search_state`.
    """
    has_eigenvalues = any(entry["eigenvalue"] is not None for entry in history)
    figure = Figure(figsize=(10 if has_eigenvalues else 7, 2.8), layout="constrained")
    left, right, *rest = figure.subplots(1, 2 + has_eigenvalues)
    for axes in rest:
        eigenvalues(axes, history)
    epochs = [entry["epoch"] for entry in history]
    for kind, colour, height in zip(space_of(genotypes[0]).kinds, ("C0", "C3"), (-0.35, -0.7)):
        margins = [entry["margins"][kind] for entry in history]
        left.plot(epochs, list(map(np.mean, margins)), color=colour, label=f"{kind}, mean")
        left.plot(epochs, list(map(np.min, margins)), color=colour, ls=":", label=f"{kind}, smallest")
        skips = [skip_connections(getattr(genotype, kind)) for genotype in genotypes]
        right.plot(epochs, skips, color=colour, label=kind, drawstyle="steps-mid")
        changed = [epochs[i] for i in changes([genes(genotype)[kind] for genotype in genotypes])]
        right.plot(changed, [height] * len(changed), "|", color=colour)
    left.set(xlabel="epoch")
    left.set_title("weight of the chosen less the next's", fontsize=10)
    right.set(xlabel="epoch", ylim=(-1, None))
    right.set_title("skip connections (marks: changes)", fontsize=10)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        epoch_axis(axes)
        axes.legend(fontsize=7)
    return figure


def truth(run):
    """The published accuracy of the cell after each epoch, on each data set. run: a `RecordedRun`."""
    epochs, truths = [entry["epoch"] for entry in run.history], [entry["truth"] for entry in run.history]
    marks = run.space.truth_marks()
    figure = Figure(figsize=(3.5 * len(marks), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(marks), squeeze=False)[0], marks):
        axes.plot(epochs, [truth[name] for truth in truths], marker=".")
        for (label, value), dash in zip(marks[name].items(), DASHES):
            axes.axhline(value, color=GREY, ls=dash, lw=1, label=f"{label} {value:.2f}")
        axes.set(xlabel="epoch", title=f"{name}, %")
        axes.legend(fontsize=7)
        epoch_axis(axes)
    return figure


def eigenvalues(axes, history):
    """The dominant eigenvalue of the Hessian of L_val in alpha, and where DARTS-ES stops."""
    known = [entry for entry in history if entry["eigenvalue"] is not None]
    axes.plot([entry["epoch"] for entry in known], [entry["eigenvalue"] for entry in known], marker=".")
    stop = early_stop(history)
    if stop is not None:
        axes.axvline(stop - WINDOW, color=GREY, ls="--", label="the cell of DARTS-ES")
        axes.legend(fontsize=8)
    axes.set(xlabel="epoch")
    axes.set_title("dominant eigenvalue", fontsize=10)
    epoch_axis(axes)


# Figures of an augment run.


def confusion_matrix(counts, names):
    """The number of images by true and by predicted class."""
    n = len(names)
    figure = Figure(figsize=(min(3 + 0.4 * n, 9), min(2.6 + 0.4 * n, 8.6)), layout="constrained")
    axes, is_named = figure.subplots(), n <= MAX_NAMED_CLASSES
    display = ConfusionMatrixDisplay(counts, display_labels=[printable(name) for name in names])
    display.plot(ax=axes, cmap="Blues", colorbar=False, include_values=is_named, xticks_rotation="vertical")
    if not is_named:
        axes.set(xticks=[], yticks=[])
    return figure


# Figures of protocols.


def members(methods, chance):
    """A row for each method and a point for each of its accuracies, on all kinds of images; means as lines.

    methods: of `comparison`; chance: the label of the random cells, whose mean and interval are shaded.
    """
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(methods)), layout="constrained")
    rows = range(len(methods), 0, -1)
    shown = [images for images in ("held-out", "test", "published") if any(m.accuracies(images) for m in methods)]
    for axes, images in zip(figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0], shown):
        for y, method in zip(rows, methods):
            values = method.accuracies(images)
            if not values:
                continue
            interval = mean_interval(values)
            colour = GREY if method.label == chance else COLOURS[0]
            if interval.low is not None:
                axes.plot([interval.low, interval.high], [y, y], color=colour, lw=5, alpha=0.3)
                if method.label == chance:
                    axes.axvspan(interval.low, interval.high, color=GREY, alpha=0.12)
            axes.plot(values, [y] * len(values), "o", color=colour, ms=5, alpha=0.7)
            axes.plot([interval.value], [y], "|", color=colour, ms=16, mew=2)
        axes.set(xlabel=f"accuracy on {images} images, %", ylim=(0.4, len(methods) + 0.6))
        axes.set_yticks(rows, [printable(method.label, 40) for method in methods])
        axes.grid(alpha=0.3, axis="x")
    return figure
