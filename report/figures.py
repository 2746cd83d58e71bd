"""The figures of a report, by matplotlib. Each function returns a `Figure`."""

import io
import warnings

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from evidence.intervals import mean_interval
from evidence.search_state import WINDOW, changes, early_stop, genes, skip_connections
from models.spaces import space_of

GREY = mpl.colormaps["tab10"](7)
COLOURS = [mpl.colormaps["tab10"](i) for i in range(10) if i != 7]  # all but grey
DASHES = ["-", "--", ":", "-."]
LINES = mpl.cycler(linestyle=DASHES) * mpl.cycler(color=COLOURS)
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


def edge_weights(run, kind):
    """Weights by epoch: a panel for each edge (row: node, column: source) with a line for each candidate.

    run: a `RecordedRun`; kind: a kind of cell.
    """
    weights, candidates, space = run.edge_weights(kind), run.config.primitives, run.space
    n_nodes, n_sources = len(weights), space.n_inputs + len(weights) - 1
    choosable = [candidates.index(name) for name in space.choosable(candidates)]
    figure = Figure(figsize=(1.75 * n_sources, 1.5 * n_nodes + 1), layout="constrained")
    panels = figure.subplots(n_nodes, n_sources, sharex=True, sharey=True, squeeze=False)
    for node, row in enumerate(panels):
        row[0].set_ylabel(f"node {node}", fontsize=8)
        for source, axes in enumerate(row):
            if source >= space.n_inputs + node:
                axes.set_axis_off()
                continue
            of_edge = weights[node][source]
            axes.set_prop_cycle(LINES)
            axes.plot(range(1, len(of_edge) + 1), of_edge, label=candidates, lw=1.4, marker=".", ms=2)
            strongest = max(choosable, key=of_edge[-1].__getitem__)
            axes.set_title(f"{space.state_name(source)}: {candidates[strongest]}", fontsize=7.5)
            axes.tick_params(labelsize=7)
            epoch_axis(axes)
    for axes in panels[-1]:
        axes.set_xlabel("epoch", fontsize=8)
    columns = max(1, int(1.75 * n_sources / (0.7 + 0.07 * max(map(len, candidates)))))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3)
    return figure


def margins_and_changes(genotypes, history):
    """Margins of the chosen operations, skip connections and changes of the cell, and the eigenvalue, by epoch.

    genotypes, history: of the search, by epoch; see `search_state`.
    """
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in history]
    for kind, colour, height in zip(space_of(genotypes[0]).kinds, COLOURS, (-0.35, -0.7)):
        margins = [entry["margins"][kind] for entry in history]
        left.plot(epochs, list(map(np.mean, margins)), color=colour, label=f"{kind}, mean")
        left.plot(epochs, list(map(np.min, margins)), color=colour, ls=":", label=f"{kind}, smallest")
        skips = [skip_connections(getattr(genotype, kind)) for genotype in genotypes]
        middle.plot(epochs, skips, color=colour, label=kind, drawstyle="steps-mid")
        changed = [epochs[i] for i in changes([genes(genotype)[kind] for genotype in genotypes])]
        middle.plot(changed, [height] * len(changed), "|", color=colour)
    middle.set_ylim(-1, None)
    right.plot(epochs, [entry["eigenvalue"] for entry in history], marker=".")  # None leaves a gap
    stop = early_stop(history)
    if stop is not None:
        right.axvline(stop - WINDOW, color=GREY, ls="--", label="the cell of DARTS-ES")
    titles = "weight of the chosen less the next's", "skip connections (marks: changes)", "dominant eigenvalue"
    for axes, title in zip((left, middle, right), titles):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        epoch_axis(axes)
        if axes.get_legend_handles_labels()[0]:
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
