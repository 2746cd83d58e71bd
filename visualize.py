"""Draw cells with graphviz, and write reports of runs.

python visualize.py runs/search/digits                                   # its report, report.html in its folder
python visualize.py runs/search/digits runs/search/first                 # side by side, in report.html
python visualize.py DARTS_V2                                             # a cell
python visualize.py runs/search/digits/genotype.json --format svg
python visualize.py "Genotype(normal=[[('sep_conv_3x3', 0), ...]], ...)" --output cell
"""

import re
import subprocess
from pathlib import Path

import graphviz

from genotypes import resolve
from running.errors import OneLineParser, user_errors_in_one_line

FORMATS = ("png", "svg")
HOW_TO_INSTALL = (
    "install graphviz's `dot` to draw it (Debian, Ubuntu: apt-get install graphviz; macOS: brew install graphviz)"
)


def plot(gene, file_path, caption=None, concat=None):
    """Draw a gene (a list of nodes, each a list of (operation, source)) as a picture.

    file_path: where to, ending in .png or .svg; .png is added to any other. caption: a line above the cell; concat: the
    states that make the output, all nodes if not given. Returns the path of the picture; or, where the `dot` program is
    missing, of its .gv source, which `dot` can draw later.
    """
    path = Path(file_path)
    if path.suffix[1:] not in FORMATS:
        path = path.with_name(path.name + ".png")
    graph = draw(gene, caption, concat)
    if path.suffix == ".png":
        graph.graph_attr["dpi"] = "100"  # which cuts SVGs off
    source = path.with_suffix(".gv")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(graph.source, encoding="utf-8")
    try:
        path.write_bytes(graph.pipe(format=path.suffix[1:]))
    except (graphviz.ExecutableNotFound, subprocess.CalledProcessError):
        return source
    source.unlink()
    return path


def draw(gene, caption=None, concat=None):
    """The gene as a `graphviz.Digraph`: inputs left, a box per node, an arrow per operation, output right."""
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "fontname": "Helvetica", "fontsize": "20", "labelloc": "t"},
        node_attr={
            "style": "filled,rounded", "shape": "box", "fontname": "Helvetica", "fontsize": "18", "height": "0.5",
            "width": "0.5", "penwidth": "1.5",
        },
        edge_attr={"fontname": "Helvetica", "fontsize": "16"},
    )  # fmt: skip
    if caption:
        graph.attr(label=caption)
    inputs = ("c_{k-2}", "c_{k-1}")
    for name in inputs:
        graph.node(name, fillcolor="darkseagreen2")
    for i in range(len(gene)):
        graph.node(str(i), fillcolor="lightblue")
    graph.node("c_{k}", fillcolor="palegoldenrod")
    for i, edges in enumerate(gene):
        for op, source in edges:
            graph.edge(inputs[source] if source < 2 else str(source - 2), str(i), label=op)
        if concat is None or i + 2 in concat:
            graph.edge(str(i), "c_{k}")
    return graph


def main():
    parser = OneLineParser(description="Write a report of runs, or draw both cells of a genotype.")
    parser.add_argument("what", nargs="+", help="runs' folders; or a genotype, as for augment.py --genotype")
    parser.add_argument(
        "--output", metavar="PATH",
        help="the report (default: report.html, in a single run's folder); pictures are PATH-normal and PATH-reduce",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the pictures (default: %(default)s)")
    args = parser.parse_args()
    with user_errors_in_one_line(parser.prog):
        from report import pages as report  # which takes a while, and draws with this module

        if len(args.what) > 1 or report.is_run(args.what[0]):
            path = Path(args.output or (Path(args.what[0]) if len(args.what) == 1 else Path()) / "report.html")
            report.write(args.what, path)
            print(path)
            return
        genotype = resolve(args.what[0])
        prefix = args.output or re.sub(r"[^\w.-].*", "", Path(args.what[0]).name, flags=re.DOTALL) or "cell"
        for kind in ("normal", "reduce"):
            gene, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
            path = plot(gene, f"{prefix}-{kind}.{args.format}", f"{kind} cell", concat)
            print(path if path.suffix != ".gv" else f"{path}: {HOW_TO_INSTALL}")


if __name__ == "__main__":
    main()
