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
TITLES = {"held-out": "Accuracy on held-out training images, %", "test": "Accuracy on test images, %"}


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
    tables = {title: [ACCURACY_HEADS, *accuracy_rows(methods, images)] for images, title in TITLES.items()}
    tables = {title: rows for title, rows in tables.items() if len(rows) > 1} | published.tables(methods)
    if path.suffix == ".md":
        path.write_text("\n".join(map(markdown, tables, tables.values())), "utf-8", "backslashreplace")
    elif path.suffix == ".svg":
        path.write_bytes(figures.to_svg(by_epoch or figure))
    else:
        write_page(
            path,
            "protocols.html",
            title=", ".join(results["label"] for results in all_results),
            columns=1,
            all_results=all_results,
            tables=tables,
            figure=picture(figure),
            by_epoch=by_epoch and picture(by_epoch),
            members=[MEMBER_HEADS, *(member_row(method, member) for method in methods for member in method.members)],
            cells={
                method.label: [
                    (member["name"], drawings(from_str(member["genotype"])))
                    for member in method.members
                    if member["genotype"]
                ]
                for method in methods
            },
        )


# Which results can be compared


def conditions(results):
    """What results must have in common to be compared; None: not known yet."""
    images = (member["selection"]["fingerprints"] for member in results["members"] if "selection" in member)
    space = {f"--{name}": value for name, value in results["search_space"].items()}
    others = {"options of trainings": results["training_options"], "--finals": results["finals"]}
    return space | others | {"images": next(images, None)}


def check_comparable(first, other):
    """Raise UserError, which says what differs, if two results can't be compared."""
    pairs = zip(conditions(first).items(), conditions(other).values())
    differences = [name for (name, value), of_other in pairs if None not in (value, of_other) and value != of_other]
    if differences:
        raise UserError(
            f"{first['label']!r} and {other['label']!r} can't be compared, since they have other "
            f"{', '.join(differences)}; write a report of each"
        )


def methods_of(all_results: list[dict]) -> list[Method]:
    """The `Method`s of results. A member that several results have counts once.

    Raises UserError if results can't be compared, or if different searches have the same label.
    """
    members_by_method = defaultdict(dict)  # label -> seed, or name of a published cell -> member
    search_options = {}  # label -> options
    for results in all_results:
        check_comparable(all_results[0], results)
        label, options = results["label"], results["search_options"]
        if options is not None and search_options.setdefault(label, options) != options:
            raise UserError(f"searches with different options are both called {label!r}: change a label")
        for member in results["members"]:
            method = {"search": label, "random": CHANCE, "published": member["name"]}[member["kind"]]
            known = members_by_method[method].setdefault(member["seed"], member)
            if known["genotype"] != member["genotype"]:
                raise UserError(f"two results of {method!r} with the seed {member['seed']} differ: change a label")
    finals = all_results[0]["finals"]
    return [Method(label, list(members.values()), finals) for label, members in members_by_method.items()]


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
    *("method", "member", "held-out, %", "test, %", "published, %", "parameters, M", "skips"),
    *("hours of search", "hours of trainings", "the search's verdict"),
]


def member_row(method, member):
    search, trainings = member.get("search", {}), [*member.get("final", [])]
    trainings += [member["selection"]] if "selection" in member else []
    return [
        method.label,
        member["name"],
        text_of(100 * member["held_out_top1"] if "held_out_top1" in member else None, ".2f"),
        ", ".join(f"{value:.2f}" for value in final_accuracies(member)) or NONE,
        text_of(next(iter((member.get("truth") or {}).values()), None), ".2f"),
        text_of(member.get("parameters_M"), ".3g"),
        ", ".join(f"{n} {kind}" for kind, n in member.get("skip_connections", {}).items()) or NONE,
        text_of(search["seconds"] / 3600 if search else None, ".2f"),
        text_of(sum(run["seconds"] for run in trainings) / 3600, ".2f"),
        search.get("verdict", NONE),
    ]


def text_of(number, number_format):
    return NONE if number is None else f"{number:{number_format}}"
