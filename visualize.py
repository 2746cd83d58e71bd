"""Draw cells with graphviz, and write reports of runs.

python visualize.py runs/search/digits                                   # its report, report.html in its folder
python visualize.py runs/search/digits runs/search/first                 # side by side, in report.html
python visualize.py A/results.json B/results.json                        # protocols side by side, in report.html
python visualize.py DARTS_V2                                             # a cell
python visualize.py runs/search/digits/genotype.json --format svg
python visualize.py "Genotype(normal=[[('sep_conv_3x3', 0), ...]], ...)" --output cell
"""

import os
import re
from pathlib import Path

from command_line.errors import OneLineParser, UserError, user_errors_in_one_line
from genotypes import resolve
from models.spaces import space_of
from report.cells import FORMATS, HOW_TO_INSTALL, draw, plot, plot_cell  # noqa: F401 -- users import `draw` and `plot`
from run.folder import RunFolder, read_json, reading


def main():
    parser = OneLineParser(description="Write a report of runs or protocols, or draw both cells of a genotype.")
    what = "runs' folders; or results.json of protocols; or a genotype, as for augment.py --genotype"
    parser.add_argument("what", nargs="+", help=what)
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="PATH",
        help="the report (default: report.html, in a single run's folder); for protocols a name in .md gives the "
        "tables, and one in .svg the figure; pictures are PATH-normal and PATH-reduce, or PATH-cell",
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the pictures (default: %(default)s)")
    args = parser.parse_args()
    if all(map(is_results, args.what)):
        write_comparison(args.what, args.output)
    elif len(args.what) > 1 or is_run(args.what[0]):
        write_report(args.what, args.output)
    else:
        draw_cells(args.what[0], args.output, args.format)


def is_run(path):
    """Whether a path is the folder of a run."""
    try:
        return RunFolder(path).config.is_file()
    except (OSError, ValueError):  # not a possible file name
        return False


def is_results(path):
    """Whether a path is the results.json of a protocol, by its content."""
    content = read_json(path) if path.endswith(".json") and not is_run(path) else None
    return isinstance(content, dict) and "members" in content


def write_report(folders, output):
    """Write the report of these runs, by default into the folder of a single one, and print its path."""
    from report.pages import write  # here, since it imports torch and matplotlib, which take seconds

    folder = Path(folders[0]) if len(folders) == 1 else Path()
    path = output_path(output, folder, [".html"])
    with reading(", ".join(map(str, folders))):
        write(folders, path)
    print(path)


def write_comparison(files, output):
    """Write the report of protocols, by default beside the file of a single one, and print its path."""
    from report.comparison import write  # here, since it imports torch and matplotlib

    folder = Path(files[0]).parent if len(files) == 1 else Path()
    path = output_path(output, folder, [".html", ".md", ".svg"])
    with reading(", ".join(files)):
        write([read_json(file) for file in files], path)
    print(path)


def output_path(output, folder, endings):
    """The path of a report: `output`, or report.html in a folder."""
    path = Path(output or folder / "report.html")
    if path.suffix not in endings:
        raise UserError(f"--output must end in {' or '.join(endings)}, not {path.name!r}")
    return path


def draw_cells(text, output, picture_format):
    """Draw the cells of a genotype and print the pictures' paths. text: what `genotypes.resolve` takes."""
    genotype = resolve(text)
    prefix = output or re.sub(r"[^\w.-].*", "", Path(text).name, flags=re.DOTALL) or "cell"
    for kind in space_of(genotype).kinds:
        path = plot_cell(genotype, kind, f"{prefix}-{kind}.{picture_format}")
        print(f"{path}: not drawn; {HOW_TO_INSTALL}" if path.suffix == ".gv" else path)


if __name__ == "__main__":
    with user_errors_in_one_line("visualize.py"):
        main()
