"""Reports of runs as one self-contained HTML page. `visualize.py RUN ...` writes it.

For an augment run, the best network is evaluated on the test or held-out images again.
"""

import base64
import html
import json
from pathlib import Path
from string import Template

import torch

from command_line.errors import INPUT_ERRORS
from config import AugmentConfig
from evidence.search_state import cell, changes, chosen, verdict
from genotypes import from_str, network_of
from machine.devices import pick_device
from models.costs import cost, describe, describe_latency
from report import figures
from report.cells import NotDrawnError, draw, render
from report.story import KINDS, commands, read
from run.options import option_name
from trained.evaluation import evaluate, load_network, load_trained
from utils import image_shape

TEMPLATE = Path(__file__).with_name("page.html")


def write(folders, path):
    """Write the report of one run, or of several side by side, to an HTML file."""
    stories = [read(folder) for folder in folders]
    columns = [f'<section class="run">{column(story)}</section>' for story in stories]
    title = "DARTS: " + ", ".join(str(story.folder) for story in stories)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        columns="\n".join(columns),
        count=len(stories),
    )
    Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")  # file names need not be UTF-8


def column(story):
    """The HTML of one run, a column of the page."""
    options = [(option_name(name), value) for name, value in sorted(story.config.as_dict().items())]
    return "\n".join(
        [
            f"<h1>{html.escape(str(story.folder))}</h1>",
            section("Results", table(results(story))),
            section("Curves", picture(figures.curves(story), "loss and accuracy by epoch")),
            *(search_sections(story) if story.stage == "search" else augment_sections(story)),
            section("Again", f"<pre>{html.escape(chr(10).join(commands(story)))}</pre>"),
            section("Configuration", table(options), folded=True),
        ]
    )


def results(story):
    """(name, value) of each result; before the end of the run, its progress."""
    if not story.summary:
        return [("stage", story.stage), ("epochs so far", f"{len(story.steps)} of {story.config.epochs}")]
    return [
        (name, f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in story.summary.items()
        if name not in ("genotype", "folder")
    ]


# A search.


def search_sections(story):
    genotypes, candidates = story.genotypes(), story.candidates
    weights = {kind: story.edge_weights(kind) for kind in KINDS}
    settling = picture(
        figures.settling(genotypes, weights, candidates, story.history),
        "margins of the choice, skip connections and dominant eigenvalue by epoch",
    )
    state = html.escape(verdict(story.history))
    result = from_str(chosen(story.history, story.config.early_stop)["string"])
    return [
        section("The cell, epoch by epoch", film(story, genotypes)),
        *(edge_section(kind, weights[kind], candidates) for kind in KINDS),
        section("How settled the choice is", f"<p><b>{state}</b></p><p>{stability(genotypes)}</p>{settling}"),
        section("What the cell costs", default_cost(result, story.config)),
    ]


def edge_section(kind, weights, candidates):
    """The section with the weights of all candidates on all edges of a cell."""
    figure = figures.edge_weights(weights, candidates)
    return section(
        f"Weight of each operation, {kind} cell",
        "<p>A panel for each edge, from a source (columns) to a node (rows). Its title names the source and the "
        "strongest operation other than <code>none</code>.</p>"
        + scrolled(picture(figure, f"weights of the {kind} cell's edges")),
    )


def film(story, genotypes):
    """Both cells after each epoch, with a slider for the epoch. Equal cells share a picture."""
    pictures, frames = {}, []  # (kind, gene as text) -> the picture's index and HTML
    for genotype in genotypes:
        frame = []
        for kind in KINDS:
            gene, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
            key = kind, f"{gene} {concat}"
            if key not in pictures:
                pictures[key] = len(pictures), drawing(kind, gene, concat)
            frame.append(pictures[key][0])
        frames.append(frame)
    cells = "".join(f'<div class="cell" data-picture="{i}" hidden>{cell}</div>' for i, cell in pictures.values())
    labels = [f"epoch {epoch['epoch']}, top 1 {epoch['valid_top1']:.2%}" for epoch in story.history]
    frames_json, labels_json = (html.escape(json.dumps(values)) for values in (frames, labels))
    return (
        f'<div class="film" data-frames="{frames_json}" data-labels="{labels_json}">'
        f'<p><button type="button">Play</button> <input type="range" min="0" max="{len(frames) - 1}" '
        f'value="{len(frames) - 1}" aria-label="epoch"> <output></output></p>{cells}</div>'
    )


def drawing(kind, gene, concat):
    """A cell as a picture; if `dot` is missing or fails, the gene as text, and the error."""
    try:
        svg = render(draw(gene, f"{kind} cell", concat), "svg")
    except NotDrawnError as error:
        return f"<p>{kind}: <code>{html.escape(str(gene))}</code></p><p>{html.escape(str(error))}</p>"
    return scrolled(image(svg, f"{kind} cell: {gene}"))


def stability(genotypes):
    """A sentence: how often and when the genotype changed."""
    n, epochs = len(genotypes), [i + 1 for i in changes(list(map(cell, genotypes)))]
    if not epochs:
        return f"The genotype was the same in all {n} epochs."
    listed = ", ".join(map(str, epochs if len(epochs) <= 20 else [*epochs[:10], "...", *epochs[-9:]]))
    often, when = (f"{len(epochs)} times", f"epochs {listed}") if len(epochs) > 1 else ("once", f"epoch {listed}")
    return f"The genotype changed {often} in {n} epochs, at {when}; it has been the same since epoch {epochs[-1]}."


def default_cost(genotype, config):
    """The cost of the network that augment.py builds by default, for images of the search's data set; 10 classes."""
    default = AugmentConfig.defaults()
    size, channels = image_shape(config.dataset, config.image_size, config.image_channels)
    net = network_of(genotype, size, channels, n_classes=10)
    net = net.to(pick_device("auto"), memory_format=torch.channels_last)
    return network_cost(net, default.layers, default.init_channels, channels, size, ", 10 classes")


# An augment run.


def augment_sections(story):
    try:
        checkpoint = load_trained(story.folder)
        evaluation = evaluate(story.folder, data_path=story.config.data_path)
    except INPUT_ERRORS as error:
        return [section(f"On the {story.held_out} images", f"<p>Not shown: {html.escape(str(error))}</p>")]
    names, confusion = evaluation.names, evaluation.confusion()
    totals = confusion.sum(1)
    by_class = [(name, f"{confusion[i, i] / max(totals[i], 1):.2%} of {totals[i]}") for i, name in enumerate(names)]
    overall = f"{evaluation.top1:.2%} of {len(evaluation.labels)} {evaluation.part} images, by {evaluation.checkpoint}."
    mistakes = "<p>None.</p>"
    if evaluation.wrong():
        mistakes = picture(figures.mistakes(evaluation), "the wrong predictions that the network was surest of")
    trained, options = checkpoint["results"], checkpoint["config"]
    costs = network_cost(
        load_network(checkpoint, pick_device("auto")),
        options.layers,
        options.init_channels,
        trained["input_channels"],
        trained["input_size"],
    )
    return [
        section("Accuracy by class", f"<p>{html.escape(overall)}</p>{table(by_class)}", folded=len(names) > 20),
        section("Confusion", picture(figures.confusion_matrix(confusion, names), "confusion matrix")),
        section("Worst mistakes", mistakes),
        section("What the network costs", costs),
    ]


def network_cost(net, layers, C, channels, size, note=""):
    """A paragraph with the cost of a network, and its latency on this machine."""
    return (
        f"<p>{layers} cells, C = {C}, images of {channels} x {size} x {size}{note}: "
        f"{html.escape(describe(cost(net, channels, size)))}. A forward pass takes "
        f"{html.escape(describe_latency(net, channels, size))}.</p>"
    )


# Pieces of a page.


def section(title, content, folded=False):
    """A heading with content. folded: the content is shown when the heading is clicked."""
    if folded:
        return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
    return f"<h2>{html.escape(title)}</h2>{content}"


def table(rows):
    """A table of (name, value) rows."""
    cells = (f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def scrolled(content):
    """Content that scrolls horizontally if the screen is too narrow."""
    return f'<div class="wide">{content}</div>'


def picture(figure, text):
    """A matplotlib figure as an image. text: the alt text, for those who cannot see it."""
    return image(figures.to_svg(figure), text)


def image(svg, text):
    encoded = base64.b64encode(svg).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}" alt="{html.escape(text)}">'
