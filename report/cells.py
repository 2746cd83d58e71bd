"""Drawings of cells, by graphviz's `dot` program."""

import subprocess
from pathlib import Path

import graphviz

FORMATS = ("png", "svg")
HOW_TO_INSTALL = (
    "install graphviz's `dot` to draw it (Debian, Ubuntu: apt-get install graphviz; macOS: brew install graphviz)"
)
INPUTS = ("c_{k-2}", "c_{k-1}")  # the outputs of the two previous cells
OUTPUT = "c_{k}"


class NotDrawnError(Exception):
    """`dot` is missing or failed; the message says which. source: the .gv file that was written instead, or None."""

    source = None


def plot(gene, file_path, caption=None, concat=None):
    """Draw a gene (a list of nodes, each a list of (operation, source)) as a picture.

    file_path: the output, which ends in .png or .svg; otherwise .png is appended. caption: a line above the cell;
    concat: the states that are concatenated to the output, by default all nodes. Returns the path of the picture. If
    `dot` is missing or fails, returns that of a .gv file, which `dot` can draw later.
    """
    try:
        return write_picture(gene, file_path, caption, concat)
    except NotDrawnError as error:
        return error.source


def write_picture(gene, file_path, caption=None, concat=None):
    """As `plot`, but raises NotDrawnError if `dot` is missing or fails."""
    path = Path(file_path)
    if path.suffix[1:] not in FORMATS:
        path = path.with_name(path.name + ".png")
    graph = draw(gene, caption, concat)
    if path.suffix == ".png":
        graph.graph_attr["dpi"] = "100"  # an SVG of another resolution than the default would be cut off
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture = render(graph, path.suffix[1:])
    except NotDrawnError as error:
        error.source = path.with_suffix(".gv")
        error.source.write_text(graph.source, encoding="utf-8")
        raise
    path.write_bytes(picture)
    return path


def render(graph, picture_format):
    """The bytes of a graph's picture, "png" or "svg". Raises NotDrawnError."""
    try:
        return graph.pipe(format=picture_format)
    except graphviz.ExecutableNotFound:
        raise NotDrawnError(HOW_TO_INSTALL) from None
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace") if error.stderr else str(error)
        raise NotDrawnError(f"graphviz's `dot` failed: {' '.join(message.split())}") from None
    except OSError as error:  # such as a file without permission to run it
        raise NotDrawnError(f"graphviz's `dot` cannot be run: {error}") from None


def draw(gene, caption=None, concat=None):
    """The gene as a `graphviz.Digraph`: inputs left, a box per node, an arrow per operation, output right."""
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "fontname": "Helvetica", "fontsize": "20", "labelloc": "t"},
        node_attr={
            "style": "filled,rounded",
            "shape": "box",
            "fontname": "Helvetica",
            "fontsize": "18",
            "height": "0.5",
            "width": "0.5",
            "penwidth": "1.5",
        },
        edge_attr={"fontname": "Helvetica", "fontsize": "16"},
    )
    if caption:
        graph.attr(label=caption)
    for name in INPUTS:
        graph.node(name, fillcolor="darkseagreen2")
    for i in range(len(gene)):
        graph.node(str(i), fillcolor="lightblue")
    graph.node(OUTPUT, fillcolor="palegoldenrod")
    for i, edges in enumerate(gene):
        for op, source in edges:
            graph.edge(INPUTS[source] if source < 2 else str(source - 2), str(i), label=op)
        if concat is None or i + 2 in concat:
            graph.edge(str(i), OUTPUT)
    return graph
