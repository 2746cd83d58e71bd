"""The figure and the table of docs/collapse.md: how searches that start with the same seed end.

    python benchmarks/collapse.py docs/collapse/*.json --output docs/collapse.svg

Each file is the `history.json` of a search's folder, renamed to say which search it is, with numbers rounded to four
digits. The commands that made them are in docs/collapse.md.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command_line.errors import user_errors_in_one_line
from evidence.search_state import after_warm_up, early_stop, local_averages, skip_connections, verdict
from genotypes import from_str
from report.figures import epoch_axis, to_svg
from report.recorded_run import KINDS
from run.folder import read_json

HEADS = ("search", "epochs", "validation, %", "skips, normal", "skips, reduction", "eigenvalue", "state at the end")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("histories", nargs="+", type=Path, metavar="FILE", help="NAME.json")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg")
    args = parser.parse_args()
    with user_errors_in_one_line("collapse.py"):
        histories = {path.stem: read_json(path) for path in args.histories}
        for cells in (HEADS, ["---"] * len(HEADS), *(row(*pair) for pair in histories.items())):
            print("| " + " | ".join(cells) + " |")
        args.output.write_bytes(to_svg(figure(histories)))


def skips(entry, kind):
    """The number of skip connections in a cell after an epoch."""
    return skip_connections(getattr(from_str(entry["string"]), kind))


def row(name, history):
    """A row of the table, under `HEADS`."""
    last, learned = history[-1], after_warm_up(history)
    averages = list(local_averages(learned).values())
    eigenvalue = f"{averages[0]:.2f} to {averages[-1]:.2f}" if averages else "-"
    counts = (f"{skips(last, kind)}, at most {max(skips(entry, kind) for entry in learned)}" for kind in KINDS)
    return name, str(last["epoch"]), f"{100 * last['valid_top1']:.1f}", *counts, eigenvalue, verdict(history)


def figure(histories):
    """Validation accuracy, skip connections of both cells, and the eigenvalue's local average, by epoch."""
    result = Figure(figsize=(10, 3), layout="constrained")
    left, middle, right = result.subplots(1, 3)
    for i, (name, history) in enumerate(histories.items()):
        epochs, averages = [entry["epoch"] for entry in history], local_averages(history)
        style = {"color": f"C{i}", "label": name}
        left.plot(epochs, [100 * entry["valid_top1"] for entry in history], **style)
        for kind, line in zip(KINDS, ("-", ":")):
            counts = [skips(entry, kind) for entry in history]
            middle.plot(epochs, counts, color=f"C{i}", ls=line, drawstyle="steps-mid")
        right.plot(list(averages), list(averages.values()), **style)
        stop = early_stop(history)
        if stop is not None:
            right.plot([stop], [averages[stop]], "s", color=f"C{i}")
    left.set_title("validation accuracy, %", fontsize=10)
    middle.set_title("skip connections (dotted: reduction cell)", fontsize=10)
    right.set_title("eigenvalue (square: DARTS-ES stops)", fontsize=10)
    for axes in (left, middle, right):
        axes.set(xlabel="epoch")
        epoch_axis(axes)
    left.legend(fontsize=8)
    return result


if __name__ == "__main__":
    main()
