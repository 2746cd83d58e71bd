"""Drawings of cells, by graphviz's `dot` program."""

import subprocess
from pathlib import Path
from typing import Any

import graphviz

from models.spaces import SPACES, space_of
from models.spaces.space import Space, cell_name

FORMATS = ("png", "svg")
HOW_TO_INSTALL = (
    "install graphviz's `dot` to draw it (Debian, Ubuntu: apt-get install graphviz; macOS: brew install graphviz)"
)
OUTPUT = "c_{k}"
FONT = {"fontname": "Helvetica", "fontsize": "18"}


def plot(gene: list, file_path: str | Path, caption: str | None = None, **options) -> Path:
    """Draw a gene (a list of nodes, each a list of (operation, source)) as a picture, and return its path.

    file_path: the output, which ends in .png or .svg; otherwise .png is appended. caption, options: see `draw`. If
    `dot` is missing or fails, a .gv file, which `dot` can draw later, is written instead.
    """
    return write(draw(gene, caption, **options), file_path)


def plot_cell(genotype: Any, kind: str, file_path: str | Path, caption: str | None = None) -> Path:
    """As `plot`, of a genotype's cell of a kind."""
    return write(draw_cell(genotype, kind, caption), file_path)


def write(graph: graphviz.Digraph, file_path: str | Path) -> Path:
    """Write the picture of a graph, or its source, see `plot`."""
    path = Path(file_path)
    if path.suffix[1:] not in FORMATS:
        path = path.with_name(path.name + ".png")
    if path.suffix == ".png":
        graph.graph_attr["dpi"] = "100"  # an SVG of another resolution than the default would be cut off
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = render(graph, path.suffix[1:])
    if picture is None:
        path, picture = path.with_suffix(".gv"), graph.source.encode()
    path.write_bytes(picture)
    return path


def render(graph: graphviz.Digraph, picture_format: str) -> bytes | None:
    """The picture of a graph, "png" or "svg"; None if `dot` is missing or fails."""
    try:
        return graph.pipe(format=picture_format)
    except (graphviz.ExecutableNotFound, OSError, subprocess.CalledProcessError):
        return None


def draw_cell(genotype: Any, kind: str, caption: str | None = None) -> graphviz.Digraph:
    """As `draw`, of a genotype's cell of a kind."""
    space = space_of(genotype)
    return draw(getattr(genotype, kind), caption or cell_name(kind), space.output_states(genotype, kind), space)


def draw(
    gene: list, caption: str | None = None, concat: list | range | None = None, space: Space = SPACES["darts"]
) -> graphviz.Digraph:
    """The gene as a `graphviz.Digraph`: inputs left, a box per node, an arrow per operation, output right.

    caption: a line above the cell; concat: the states that the output consists of, by default all nodes.
    """
    box = {"style": "filled,rounded", "shape": "box", "height": "0.5", "width": "0.5", "penwidth": "1.5"}
    graph = graphviz.Digraph(graph_attr=FONT | {"rankdir": "LR", "labelloc": "t"}, node_attr=FONT | box, edge_attr=FONT)
    if caption:
        graph.attr(label=caption)
    n_inputs = space.n_inputs
    names = [space.state_name(state).removeprefix("node ") for state in range(n_inputs + len(gene))]
    for state, name in enumerate(names):
        graph.node(name, fillcolor="darkseagreen2" if state < n_inputs else "lightblue")
    graph.node(OUTPUT, fillcolor="palegoldenrod")
    for i, edges in enumerate(gene):
        for op, source in edges:
            graph.edge(names[source], str(i), label=op)
        if concat is None or n_inputs + i in concat:
            graph.edge(str(i), OUTPUT)
    return graph
