"""The results of protocols, one or several side by side: tables with intervals, a figure, and all cells.

`protocol.py` writes the page, and `visualize.py A/results.json B/results.json`.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from command_line.errors import UserError
from evidence.intervals import difference_interval, mean_interval
from experiment.protocol_options import CHANCE
from genotypes import from_str
from models.spaces import SPACES
from report import figures, published
from report.html import drawings, picture, write_page

NONE = "-"  # in a table
KINDS_OF_RUNS = ("search", "selection", "final")
IMAGES = {
    "held-out": "held-out training images",
    "test": "test images",
}


@dataclass
class Method:
    """A row of the tables: the members that one way of choosing cells has given, under the same conditions."""

    label: str
    members: list[dict]
    finals: str  # the members trained in full: best or all

    def selected(self) -> dict | None:
        """The member that is best on the held-out images, the first of equal ones; None before any selection."""
        trained = [member for member in self.members if "held_out_top1" in member]
        return max(trained, key=lambda member: member["held_out_top1"], default=None)

    def accuracies(self, images: str) -> list[float]:
        """Accuracies in percent, one for each member that was trained so.

        images: `held-out`, after the selection training, or `test`, after the final ones: of a member the mean over
        seeds, but if it is the only one, the accuracy of each seed. With `--finals best` it is the selected one.
        `published`: what is known of the cells, without a training.
        """
        if images == "published":
            return [next(iter(truth.values())) for truth in self.truths()]
        if images == "held-out":
            return [100 * member["held_out_top1"] for member in self.members if "held_out_top1" in member]
        selected = self.selected()
        members = [selected] if self.finals == "best" and selected else self.members
        by_member = [final_accuracies(member) for member in members if member.get("final")]
        return by_member[0] if len(by_member) == 1 else [statistics.fmean(values) for values in by_member]

    def truths(self) -> list[dict]:
        """The published results of the members' cells, see `Space.truth`."""
        return [member["truth"] for member in self.members if member.get("truth")]

    def accuracy_of_selected(self, images: str) -> float | None:
        """The accuracy of the selected member in percent; None if it was not trained so."""
        selected = self.selected()
        if selected is None:
            return None
        values = [100 * selected["held_out_top1"]] if images == "held-out" else final_accuracies(selected)
        return statistics.fmean(values) if values else None


def final_accuracies(member):
    """The test accuracies of a member in percent, one for each seed."""
    return [100 * run["test_top1"] for run in member.get("final", [])]


def write(all_results: list[dict], path: str | Path) -> None:
    """Write about these results, each the content of a results.json.

    path: the file; .md gets the tables of accuracy, .svg the figure (by epoch where accuracies are published), and
    all others the whole as HTML. Raises UserError if the results can't be compared.
    """
    methods, path = methods_of(all_results), Path(path)
    figure = figures.members(methods, CHANCE)
    by_epoch = published.by_epoch(methods, SPACES[all_results[0]["search_space"]["space"]])
    if path.suffix == ".md":
        titled = published.tables(methods) or {
            f"Accuracy on {text}, %": [ACCURACY_HEADS, *accuracy_rows(methods, images)]
            for images, text in IMAGES.items()
        }
        path.write_text("\n".join(map(markdown, titled, titled.values())), "utf-8", "backslashreplace")
    elif path.suffix == ".svg":
        path.write_bytes(figures.to_svg(by_epoch or figure))
    else:
        write_page(
            path,
            "protocols.html",
            title=", ".join(results["label"] for results in all_results),
            columns=1,
            all_results=all_results,
            fingerprints={name.replace("_", "-"): text for (_, name), text in fingerprints(all_results[0]).items()},
            accuracy_heads=ACCURACY_HEADS,
            accuracies={description: accuracy_rows(methods, images) for images, description in IMAGES.items()},
            figure=picture(figure),
            member_heads=MEMBER_HEADS,
            published=published.tables(methods),
            by_epoch=by_epoch and picture(by_epoch),
            members=[member_row(method, member) for method in methods for member in method.members],
            cells={method.label: cells_of(method) for method in methods},
            origins={results["label"]: origins(results) for results in all_results},
        )


# Which results can be compared


def conditions(results):
    """What results must have in common to be compared, beside the images."""
    space = results["search_space"]
    return {
        "--space": space["space"],
        "--nodes": space["nodes"],
        "--primitives": sorted(space["primitives"].split(",")),
        "options of trainings": results["training_options"],
        "--finals": results["finals"],
    }


def fingerprints(results):
    """(kind of run, images) -> the fingerprint of these images, which all runs of a kind have in common."""
    known = {}
    for member in results["members"]:
        for kind in KINDS_OF_RUNS:
            for run in runs_of(member, kind):
                known |= {(kind, images): text for images, text in run["fingerprints"].items()}
    return known


def runs_of(member, kind):
    """The runs of a kind that are over."""
    runs = member.get(kind, [])
    return runs if isinstance(runs, list) else [runs]


def check_comparable(first, other):
    """Raise UserError, which says what differs, if two results can't be compared."""
    differences = [name for name, value in conditions(first).items() if conditions(other)[name] != value]
    images, other_images = fingerprints(first), fingerprints(other)
    if any(images[key] != other_images[key] for key in images.keys() & other_images.keys()):
        differences.append("images")
    if differences:
        raise UserError(
            f"{first['label']!r} and {other['label']!r} can't be compared, since they have other "
            f"{', '.join(differences)}; write a report of each"
        )


def methods_of(all_results: list[dict]) -> list[Method]:
    """The `Method`s of results. A member that several results have counts once.

    Raises UserError if results can't be compared, different searches have the same label, or one seed two cells.
    """
    members_by_method = defaultdict(dict)  # label -> seed -> member
    search_options = {}  # label -> options
    for results in all_results:
        check_comparable(all_results[0], results)
        label, options = results["label"], results["search_options"]
        if options is not None and search_options.setdefault(label, options) != options:
            raise UserError(f"searches with different options are both called {label!r}: change a label")
        for member in results["members"]:
            method = {
                "search": label,
                "random": CHANCE,
                "published": member["name"],
            }[member["kind"]]
            known = members_by_method[method].get(member["seed"])
            if known and known["genotype"] and member["genotype"] not in (None, known["genotype"]):
                raise UserError(f"{method!r} has two cells of seed {member['seed']}: write a report of each")
            if known is None or n_runs(member) > n_runs(known):
                members_by_method[method][member["seed"]] = member
    finals = all_results[0]["finals"]
    return [Method(label, list(members.values()), finals) for label, members in members_by_method.items()]


def n_runs(member):
    """How many of a member's runs are over."""
    return sum(len(runs_of(member, kind)) for kind in KINDS_OF_RUNS)


# The tables


ACCURACY_HEADS = ["method", "n", "mean", "sd", "95 %", "selected", f"less {CHANCE}", "95 %"]


def markdown(title, rows):
    """A table in Markdown, with its title. rows: the first are the heads."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    table = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    return f"{title}:\n\n{table}\n"


def accuracy_rows(methods: list[Method], images: str) -> list[list]:
    """A row for each method with accuracies on these images, under `ACCURACY_HEADS`."""
    chance = next((method.accuracies(images) for method in methods if method.label == CHANCE), [])
    rows = []
    for method in methods:
        values = method.accuracies(images)
        if not values:
            continue
        mean, sd = mean_interval(values), statistics.stdev(values) if len(values) > 1 else None
        row = [method.label, len(values), f"{mean.value:.2f}", text_of(sd, ".2f"), interval_text(mean, ".2f")]
        row.append(text_of(method.accuracy_of_selected(images), ".2f"))
        if chance and method.label != CHANCE:
            difference = difference_interval(values, chance)
            row += [f"{difference.value:+.2f}", interval_text(difference, "+.2f")]
        else:
            row += [NONE, NONE]
        rows.append(row)
    return rows


def interval_text(interval, number_format):
    return NONE if interval.low is None else f"{interval.low:{number_format}} to {interval.high:{number_format}}"


MEMBER_HEADS = [
    *("method", "member", "seed", "held-out, %", "test, %", "published, %", "rank"),
    *("parameters, M", "multiply-adds, M", "skips"),
    *("hours of search", "hours of trainings", "eigenvalue", "the search's verdict"),
]


def member_row(method, member):
    search, trainings = member.get("search", {}), [*runs_of(member, "selection"), *runs_of(member, "final")]
    held_out = [100 * member["held_out_top1"]] if "held_out_top1" in member else []
    truth, skips = member.get("truth") or {}, member.get("skip_connections", {})
    return [
        method.label,
        member["name"],
        text_of(member["seed"], "d"),
        ", ".join(f"{value:.2f}" for value in held_out) or NONE,
        ", ".join(f"{value:.2f}" for value in final_accuracies(member)) or NONE,
        text_of(next(iter(truth.values()), None), ".2f"),
        text_of(truth.get("rank"), "d"),
        text_of(member.get("parameters_M"), ".3g"),
        text_of(member.get("multiply_adds_M"), ".3g"),
        ", ".join(f"{n} {kind}" for kind, n in skips.items()) or NONE,
        text_of(search["seconds"] / 3600 if search else None, ".2f"),
        text_of(sum(run["seconds"] for run in trainings) / 3600, ".2f"),
        text_of(search.get("eigenvalue"), ".3g"),
        search.get("verdict", NONE),
    ]


def text_of(number, number_format):
    return NONE if number is None else f"{number:{number_format}}"


def cells_of(method):
    """The name and the drawings of each member that has a genotype."""
    members = []
    for member in method.members:
        if member["genotype"]:
            members.append({"name": member["name"], "drawings": drawings(from_str(member["genotype"]))})
    return members


def origins(results):
    """The versions and machines that ran the members."""
    runs = [run for member in results["members"] for kind in KINDS_OF_RUNS for run in runs_of(member, kind)]
    return sorted({f"{run['version']}; {run['machine']}" for run in runs})
