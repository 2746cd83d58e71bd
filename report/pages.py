"""Reports of runs: one HTML page that holds all it shows, from what a run's folder keeps.

`visualize.py RUN ...` writes it. A search's numbers come from history.json and TensorBoard's files; an augment run's
from the latter, and from its best network, which is run on the test images once more.
"""

import base64
import functools
import html
import io
import itertools
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import graphviz
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import CONFIG_FILE, AugmentConfig, SearchConfig
from cost import cost, describe, describe_latency
from genotypes import from_str
from models.augment_cnn import AugmentCNN
from models.choices import PRIMITIVES
from running.data_sets import DATASETS
from running.errors import UserError
from running.evaluation import evaluate, load_network, load_trained
from running.run import HISTORY, SUMMARY, TENSORBOARD, alpha_tag, pick_device, quote
from visualize import HOW_TO_INSTALL, draw

KINDS = ("normal", "reduce")
COLOURS = [mpl.colormaps["tab10"](i) for i in (0, 1, 2, 3, 4, 6, 9, 7)]  # one for each primitive, `none` grey


@dataclass
class Story:
    """What a run's folder tells: options, results, scalars (tag -> steps and values), a search's history."""

    folder: Path
    stage: str
    config: object
    summary: dict
    scalars: dict
    history: list = field(default_factory=list)

    def by_epoch(self, tag):
        """The last values of a tag, one for each epoch that is over."""
        return self.scalars.get(tag, ([], []))[1][-len(self.scalars.get("epoch", ([], []))[1]) :]


def is_run(path):
    """Whether a path is a run's folder."""
    try:
        return (Path(path) / CONFIG_FILE).is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def read(folder):
    """The `Story` of a run's folder. Raises UserError where there is none, or no epoch of it is over."""
    folder = Path(folder)
    try:
        options = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is no run's folder: there is no {CONFIG_FILE} in it") from None
    stage = "search" if "order" in options else "augment"
    config = {"search": SearchConfig, "augment": AugmentConfig}[stage](["--resume", str(folder)])
    events = EventAccumulator(str(folder / TENSORBOARD), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        found = events.Scalars(tag)
        scalars[tag] = [event.step for event in found], [event.value for event in found]
    summary, history = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else None
        for name in (SUMMARY, HISTORY)
    )
    if not scalars.get("valid/top1" if stage == "search" else "test/top1") or (stage == "search" and not history):
        raise UserError(f"{folder}: no epoch is over yet, so there is nothing to show")
    return Story(folder, stage, config, summary or {}, scalars, history or [])


def write(folders, path):
    """Write the report of one run, or of several side by side, to an HTML file."""
    stories = [read(folder) for folder in folders]
    columns = "".join(f'<section class="run">{page_of(story)}</section>' for story in stories)
    title = "DARTS: " + ", ".join(str(story.folder) for story in stories)
    page = PAGE.format(title=html.escape(title), columns=columns, count=len(stories))
    Path(path).write_text(page, encoding="utf-8")


def page_of(story):
    """The inside of a run's column."""
    parts = [
        f"<h1>{html.escape(str(story.folder))}</h1>",
        in_figures(story),
        part("Curves", picture(curves(story), "loss and accuracy by epoch")),
    ]
    parts += searched(story) if story.stage == "search" else augmented(story)
    parts.append(part("Again", code(commands(story))))
    parts.append(
        part(
            "Configuration",
            table([(name.replace("_", "-"), value) for name, value in sorted(story.config.as_dict().items())]),
            folded=True,
        )
    )
    return "\n".join(parts)


def in_figures(story):
    """The results in a table."""
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in story.summary.items()
            if name not in ("genotype", "folder")]  # fmt: skip
    epochs = len(story.by_epoch("epoch"))
    rows = rows or [("stage", story.stage), ("epochs so far", f"{epochs} of {story.config.epochs}")]
    return part("Results", table(rows))


def curves(story):
    """Loss and top 1 by epoch, on the training batches and on the held-out images."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    held_out = "valid" if story.stage == "search" else "test"
    for axes, what, scale in zip(figure.subplots(1, 2), ("loss", "top1"), (1, 100)):
        for phase, name in (("train", "training"), (held_out, held_out)):
            values = scale * np.asarray(story.by_epoch(f"{phase}/{what}"))
            axes.plot(range(1, len(values) + 1), values, label=name, marker="." if len(values) < 30 else None)
        axes.set(xlabel="epoch", title="loss" if what == "loss" else "top 1, %")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# A search.


def searched(story):
    genotypes = [from_str(epoch["string"]) for epoch in story.history]
    weights = {kind: softmax_weights(story, kind) for kind in KINDS}
    parts = [part("The cell, epoch by epoch", animation(story, genotypes))]
    for kind in KINDS:
        parts.append(
            part(
                f"Softmax of alpha, {kind} cell",
                wide(picture(edges(weights[kind], kind), f"weights of the {kind} cell's edges")),
            )
        )
    parts.append(
        part(
            "How settled it is",
            changes(genotypes) + picture(settling(genotypes, weights), "margins and skip connections by epoch"),
        )
    )
    parts.append(part("What the cell costs", costs(genotypes[-1], story.config)))
    return parts


def softmax_weights(story, kind):
    """[node][source]: weights by epoch and primitive, (epochs, len(PRIMITIVES))."""
    return [
        [
            np.array([story.by_epoch(alpha_tag(kind, node, source, op)) for op in PRIMITIVES]).T
            for source in range(node + 2)
        ]
        for node in range(story.config.nodes)
    ]


def edges(weights, kind):
    """A panel for each edge: rows are nodes, columns sources, a line for each operation."""
    n = len(weights)
    figure = Figure(figsize=(1.75 * (n + 1), 1.5 * n + 0.7), layout="constrained")
    panels = figure.subplots(n, n + 1, sharex=True, sharey=True, squeeze=False)
    names = ["c_{k-2}", "c_{k-1}", *(f"node {i}" for i in range(n))]
    for node, row in enumerate(panels):
        for source, axes in enumerate(row):
            if source >= node + 2:
                axes.set_axis_off()
                continue
            values = 100 * weights[node][source]
            for op, line in enumerate(values.T):
                axes.plot(range(1, len(line) + 1), line, color=COLOURS[op], lw=1.4, label=PRIMITIVES[op])
            best = max(range(len(PRIMITIVES) - 1), key=lambda op: values[-1, op])
            axes.set_title(f"{names[source]}: {PRIMITIVES[best]}", fontsize=7.5)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if source == 0:
                axes.set_ylabel(f"node {node}, %", fontsize=8)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"{kind} cell: edges to each node (rows) from each source; titles name the strongest but none", fontsize=9
    )
    return figure


def settling(genotypes, weights):
    """Margins of what was chosen, skip connections and changes, by epoch."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(genotypes) + 1)
    for kind, colour in zip(KINDS, ("C0", "C3")):
        found = np.array([margins([[edge[i] for edge in node] for node in weights[kind]], getattr(genotype, kind))
                          for i, genotype in enumerate(genotypes)])  # fmt: skip
        left.plot(epochs, 100 * found.mean(1), color=colour, label=f"{kind}, mean")
        left.plot(epochs, 100 * found.min(1), color=colour, ls=":", label=f"{kind}, least")
        right.plot(
            epochs, [skips(getattr(g, kind)) for g in genotypes], color=colour, label=kind, drawstyle="steps-mid"
        )
        for epoch, (one, other) in enumerate(itertools.pairwise(genotypes), 2):
            if getattr(one, kind) != getattr(other, kind):
                right.plot(epoch, -0.35 if kind == "normal" else -0.7, "|", color=colour)
    left.set(xlabel="epoch", title="chosen above runner-up on its edge, %")
    right.set(xlabel="epoch", title="skip connections (marks: changes)", ylim=(-1, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def margins(weights, gene):
    """By how much each chosen operation's weight exceeds that of the best other on its edge, none left out."""
    found = []
    for node, chosen in zip(weights, gene):
        for op, source in chosen:
            others = [w for name, w in zip(PRIMITIVES, node[source]) if name not in (op, "none")]
            found.append(node[source][PRIMITIVES.index(op)] - max(others))
    return found


def skips(gene):
    """The number of skip connections in a gene."""
    return sum(op == "skip_connect" for node in gene for op, _ in node)


def changes(genotypes):
    """How often and when the genotype changed, in a sentence."""
    when = [epoch for epoch, pair in enumerate(itertools.pairwise(genotypes), 2) if pair[0] != pair[1]]
    if not when:
        return f"<p>The genotype was the same in all {len(genotypes)} epochs.</p>"
    listed = ", ".join(map(str, when if len(when) <= 20 else [*when[:10], "...", *when[-9:]]))
    return (
        f"<p>The genotype changed {len(when)} times in {len(genotypes)} epochs, at epochs {listed}; it has been the "
        f"same for the last {len(genotypes) - when[-1] + 1}.</p>"
    )


def animation(story, genotypes):
    """Both cells after each epoch, with a slider; a picture only of each different cell."""
    pictures, frames = {}, []
    for genotype in genotypes:
        frames.append([pictures.setdefault((kind, str(getattr(genotype, kind))), len(pictures)) for kind in KINDS])
    drawn = [drawing(kind, gene) for kind, gene in pictures]
    shown = "".join(f'<div class="cell" data-picture="{i}" hidden>{text}</div>' for i, text in enumerate(drawn))
    labels = [f"epoch {epoch['epoch']}, top 1 {epoch['valid_top1']:.2%}" for epoch in story.history]
    return (
        f'<div class="film" data-frames="{attribute(frames)}" data-labels="{attribute(labels)}">'
        f'<p><button type="button">Play</button> <input type="range" min="0" max="{len(frames) - 1}" '
        f'value="{len(frames) - 1}" aria-label="epoch"> <output></output></p>{shown}</div>'
    )


def attribute(value):
    return html.escape(json.dumps(value))


@functools.cache
def drawing(kind, gene):
    """A cell as an SVG, or where `dot` is missing in words. gene: as a string."""
    nodes = from_str(f"Genotype(normal={gene}, normal_concat=[2], reduce={gene}, reduce_concat=[2])").normal
    try:
        text = draw(nodes, f"{kind} cell").pipe(format="svg", encoding="utf-8")
    except graphviz.ExecutableNotFound:
        return f"<p>{html.escape(kind)}: <code>{html.escape(gene)}</code></p><p>{html.escape(HOW_TO_INSTALL)}</p>"
    return wide(image("svg+xml", text.encode(), f"{kind} cell: {gene}"))


def costs(genotype, config):
    """The cost at augment.py's defaults, for the searched data set's images."""
    default, spec = AugmentConfig(["--genotype", str(genotype)]), DATASETS[config.dataset]
    size, channels = spec.size, spec.channels
    if config.dataset == "folder":
        size, channels = config.image_size, config.image_channels
    net = AugmentCNN(size, channels, default.init_channels, 10, default.layers, False, genotype)
    about = f"{default.layers} cells, C = {default.init_channels}, images of {channels} x {size} x {size}, 10 classes"
    return cost_of(net.to(pick_device("auto"), memory_format=torch.channels_last), channels, size, about)


def cost_of(net, channels, size, about):
    """What a network costs; its latency on this machine."""
    found, latency = describe(cost(net, channels, size)), describe_latency(net, channels, size)
    return f"<p>{html.escape(about)}: {html.escape(found)}. A forward pass takes {html.escape(latency)}.</p>"


# An augment run.


def augmented(story):
    try:
        checkpoint = load_trained(story.folder)
        found = evaluate(story.folder)
    except (UserError, OSError) as error:
        return [part("On the test images", f"<p>Not shown: {html.escape(str(error))}</p>")]
    names, confusion = found.names, found.confusion()
    rows = [
        (name, f"{confusion[i, i] / max(confusion[i].sum(), 1):.2%} of {confusion[i].sum()}")
        for i, name in enumerate(names)
    ]
    about, options = checkpoint["results"], checkpoint["config"]
    size, channels = about["input_size"], about["input_channels"]
    network = f"{options['layers']} cells, C = {options['init_channels']}, images of {channels} x {size} x {size}"
    return [
        part(
            "Accuracy by class",
            f"<p>{found.top1:.2%} of {len(found.labels)} test images, by {html.escape(found.checkpoint)}.</p>"
            + table(rows),
            folded=len(rows) > 20,
        ),
        part("Confusion", picture(confusion_matrix(confusion, names), "confusion matrix")),
        part(
            "Worst mistakes",
            picture(mistakes(found), "the test images that were most surely mistaken")
            if found.wrong()
            else "<p>None.</p>",
        ),
        part(
            "What the network costs",
            cost_of(load_network(checkpoint, pick_device("auto")), channels, size, network),
        ),
    ]


def confusion_matrix(confusion, names):
    """Counts of true against predicted classes."""
    n = len(names)
    figure = Figure(figsize=(min(3 + 0.4 * n, 9), min(2.6 + 0.4 * n, 8.6)), layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if n <= 20:
        axes.set_xticks(range(n), names, rotation=90, fontsize=8)
        axes.set_yticks(range(n), names, fontsize=8)
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                axes.text(
                    j, i, count, ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.5 else "black"
                )
    return figure


def mistakes(found, most=16):
    """The mistaken images with the largest probability for the wrong class."""
    worst = found.wrong()[:most]
    columns = min(len(worst), 8)
    lines = -(-len(worst) // columns)
    figure = Figure(figsize=(1.15 * columns, 1.5 * lines), layout="constrained")
    for axes, i in zip(figure.subplots(lines, columns, squeeze=False).flat, [*worst, *[None] * columns]):
        axes.set_axis_off()
        if i is not None:
            axes.imshow(found.image(i), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            guess = int(found.probabilities[i].argmax())
            sure = f"{found.names[guess]} ({found.probabilities[i, guess]:.0%})"
            axes.set_title(f"{found.names[found.labels[i]]}, taken for\n{sure}", fontsize=6)
    return figure


# Pieces of a page.


def commands(story):
    """What to type to repeat the run and to go on from it."""
    defaults = story.config.build_parser()
    story.config.set_defaults(defaults, ["--stem", getattr(story.config, "stem", "cifar")])
    words = []
    for name, value in story.config.as_dict().items():
        if value != defaults.get_default(name) and name != "name":
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {quote(str(value))}"))
    lines = [f"python {story.stage}.py {' '.join(words)}".strip()]
    if story.stage == "search":
        lines.append(f"python augment.py {story.config.data_options()} --genotype {shlex.quote(str(story.folder))}")
    return lines


def part(title, content, folded=False):
    if folded:
        return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
    return f"<h2>{html.escape(title)}</h2>{content}"


def table(rows):
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows
    )
    return f"<table>{cells}</table>"


def code(lines):
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def wide(content):
    """What is scrolled sideways where the screen is too narrow to read it."""
    return f'<div class="wide">{content}</div>'


def picture(figure, text):
    """A figure of matplotlib's as an image in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return image("svg+xml", buffer.getvalue(), text)


def image(kind, data, text):
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{html.escape(text)}">'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; color: #222; }}
body {{ max-width: calc({count} * 60rem); }}
main {{ display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); }}
.run {{ min-width: 0; }}
.wide {{ overflow-x: auto; }}
.wide img {{ min-width: 34rem; }}
h1 {{ font-size: 1.35rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 1.6rem 0 .4rem; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; height: auto; }}
th {{ text-align: left; font-weight: 500; padding-right: 1rem; vertical-align: top; }}
td {{ overflow-wrap: anywhere; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem; }}
summary {{ cursor: pointer; margin-top: 1.2rem; font-weight: 600; }}
.film input {{ width: min(40%, 20rem); vertical-align: middle; }}
</style>
</head>
<body>
<main>{columns}</main>
<script>
for (const film of document.querySelectorAll(".film")) {{
  const frames = JSON.parse(film.dataset.frames), labels = JSON.parse(film.dataset.labels);
  const slider = film.querySelector("input"), button = film.querySelector("button");
  const cells = film.querySelectorAll(".cell");
  const show = () => {{
    cells.forEach((cell, i) => cell.hidden = !frames[slider.value].includes(i));
    film.querySelector("output").textContent = labels[slider.value];
  }};
  let timer = null;
  const stop = () => {{ clearInterval(timer); timer = null; button.textContent = "Play"; }};
  const step = () => {{ if (+slider.value < frames.length - 1) {{ slider.value++; show(); }} else stop(); }};
  button.addEventListener("click", () => {{
    if (timer) return stop();
    if (+slider.value === frames.length - 1) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(step, 400);
    show();
  }});
  slider.addEventListener("input", show);
  show();
}}
</script>
</body>
</html>
"""
