"""The results of protocols, one or several side by side, as one self-contained HTML page.

`protocol.py` writes it, and `visualize.py A/results.json B/results.json`.
"""

import html
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from string import Template

from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from evidence.intervals import difference_interval, mean_interval
from experiment.members import CHANCE
from genotypes import from_str
from report import figures
from report.pages import TEMPLATE, drawing, picture, scrolled, section, table
from report.story import KINDS

NONE = "-"  # in a table
KINDS_OF_RUNS = ("search", "selection", "final")
IMAGES = {"held-out": "held-out training images", "test": "test images"}


@dataclass
class Method:
    """A row of the tables: the members that one way of choosing cells has given, under the same conditions."""

    label: str
    members: list
    finals: str  # the members trained in full: best or all

    def selected(self):
        """The member that is best on the held-out images, the first of equal ones; None before any selection."""
        trained = [member for member in self.members if "held_out_top1" in member]
        return max(trained, key=lambda member: member["held_out_top1"], default=None)

    def accuracies(self, images):
        """Accuracies in percent, one for each member that was trained so.

        images: `held-out`, after the selection training, or `test`, after the final ones: of a member the mean over
        seeds, but where it is the only one the accuracy of each seed. With `--finals best` it is the selected one.
        """
        if images == "held-out":
            return [100 * member["held_out_top1"] for member in self.members if "held_out_top1" in member]
        selected = self.selected()
        members = [selected] if self.finals == "best" and selected else self.members
        by_member = [[100 * run["test_top1"] for run in m["final"]] for m in members if m.get("final")]
        return by_member[0] if len(by_member) == 1 else list(map(statistics.fmean, by_member))

    def of_selected(self, images):
        """The accuracy of the selected member; None if it was not trained so."""
        selected = self.selected()
        values = Method(self.label, [selected], "best").accuracies(images) if selected else []
        return statistics.fmean(values) if values else None


def write(all_results, path):
    """Write about these results, each the content of a results.json.

    path: the file; .md gets the tables of accuracy alone, .svg the figure, and all others the whole as HTML. Results
    that can't be compared stand beside each other; .md and .svg refuse them with UserError.
    """
    groups = grouped(all_results)
    if path.suffix in (".md", ".svg"):
        if len(groups) > 1:
            (first, *_), (second, *_) = groups[:2]
            others = ", ".join(what_differs(first, second))
            raise UserError(f"{path} would compare results that have other {others}; write .html")
        methods = methods_of(all_results)
        if path.suffix == ".md":
            path.write_text("\n".join(markdown(methods, images) for images in IMAGES), "utf-8", "backslashreplace")
        else:
            path.write_bytes(figures.to_svg(figures.members(methods, CHANCE)))
        return
    title = "DARTS: " + ", ".join(results["label"] for results in all_results)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        columns="\n".join(f'<section class="run">{column(group)}</section>' for group in groups),
        count=len(groups),
    )
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def grouped(all_results):
    """The results as lists of those that can be compared."""
    groups = []
    for results in all_results:
        fitting = (group for group in groups if not any(what_differs(results, other) for other in group))
        group = next(fitting, None)
        if group is None:
            groups.append([results])
        else:
            group.append(results)
    return groups


def what_differs(a, b):
    """Why two results can't be compared: the names of the conditions that differ."""
    ours, others = conditions(a), conditions(b)
    names = [name for name in ours if ours[name] != others[name]]
    images_a, images_b = fingerprints(a), fingerprints(b)
    have_other_images = any(images_a[kind] != images_b[kind] for kind in images_a.keys() & images_b.keys())
    return names + ["images"] * have_other_images


def conditions(results):
    """What results must have in common to be compared, beside the images."""
    space = results["search_space"]
    return {
        "--nodes": space["nodes"],
        "--primitives": sorted(space["primitives"].split(",")),
        "options of trainings": changed(results["training_options"], AugmentConfig),
        "--finals": results["finals"],
    }


def fingerprints(results):
    """Fingerprints of the images of each kind of run, which are the same in all of a kind, as far as they are known."""
    runs = ((kind, run) for kind in KINDS_OF_RUNS for member in results["members"] for run in runs_of(member, kind))
    return {kind: run["fingerprints"] for kind, run in runs if run["fingerprints"]}


def runs_of(member, kind):
    """The runs of a kind that are over."""
    runs = member.get(kind, [])
    return runs if isinstance(runs, list) else [runs]


def changed(options, config):
    """The options other than the defaults of `config`, as text, which options of later versions do not change."""
    defaults = vars(config.defaults())
    return json.dumps({name: value for name, value in options.items() if value != defaults.get(name)}, sort_keys=True)


def column(group):
    """The HTML of results whose cells were trained under the same conditions."""
    methods = methods_of(group)
    return "\n".join(
        [
            f"<h1>{html.escape(', '.join(results['label'] for results in group))}</h1>",
            f"<p>{html.escape(conditions_in_words(group[0]))}</p>",
            *(accuracy_section(methods, images) for images in IMAGES),
            f"<p>{html.escape(HOW_TO_READ)}</p>",
            section("Every member", scrolled(picture(figures.members(methods, CHANCE), "accuracy of every member"))),
            section("What it cost", scrolled(grid(COST_HEADS, map(cost_row, methods)))),
            section("The members", members_table(methods), folded=True),
            *(cells_section(method) for method in methods),
            section("Again", f"<pre>{html.escape(chr(10).join(results['command'] for results in group))}</pre>"),
            *(options_section(results) for results in group),
        ]
    )


HOW_TO_READ = (
    "Intervals are of 95 %: of a mean, Student's t; of a difference, Welch's. n counts what was repeated: in the first "
    "table searches, or cells drawn by chance, each trained once; in the second cells, or the seeds of a single cell. "
    "Selected is the cell that is best on the held-out images. Where the interval of a difference includes 0, no "
    "difference has been shown. A single run has no interval, nor have values that are all equal."
)


def methods_of(group):
    """The `Method`s of results under the same conditions. A member that several results have counts once.

    Raises UserError if different searches have the same label, or one seed two cells.
    """
    methods, searches = defaultdict(dict), {}  # label -> seed -> member; label -> options
    for results in group:
        options = results["search_options"] and changed(results["search_options"], SearchConfig)
        if options is not None and searches.setdefault(results["label"], options) != options:
            raise UserError(f"searches with different options are both called {results['label']!r}: change a label")
        for member in results["members"]:
            label = {
                "search": results["label"],
                "random": f"{CHANCE} like {results['like']}" if results["like"] else CHANCE,
                "published": member["name"],
            }[member["kind"]]
            known = methods[label].get(member["seed"])
            if known and known["genotype"] and member["genotype"] not in (None, known["genotype"]):
                raise UserError(f"{label!r} has two cells of seed {member['seed']}: show these results one by one")
            if known is None or progress(member) > progress(known):
                methods[label][member["seed"]] = member
    return [Method(label, list(members.values()), group[0]["finals"]) for label, members in methods.items()]


def progress(member):
    """How many of a member's runs are over."""
    return sum(len(runs_of(member, kind)) for kind in KINDS_OF_RUNS)


def conditions_in_words(results):
    """The conditions of the trainings, the search space and the images, in a few sentences."""
    space, which = results["search_space"], {"best": "selected", "all": "all"}[results["finals"]]
    found = {name: text for of_kind in fingerprints(results).values() for name, text in of_kind.items()}
    images = ", ".join(f"{name.replace('_', '-')} {text}" for name, text in found.items())
    trainings = (
        "{dataset}; networks of {layers} cells and {init_channels} channels. Each cell was trained for {select_epochs} "
        "epoch(s) on all but {hold_out:.0%} of the training images. Its accuracy on these held-out images selects. "
        "Final trainings, of " + which + " cells, are of {epochs} epochs on all training images; only these read test "
        "images. "
    ).format_map(results["training_options"])
    operations = space["primitives"].replace(",", ", ")
    searched = f"Search space: {space['nodes']} nodes; {operations}."
    return f"{trainings}{searched} Fingerprints of the images: {images or 'not known'}."


# The tables


ACCURACY_HEADS = ["method", "n", "mean", "sd", "95 %", "selected", f"less {CHANCE}", "95 %"]


def accuracy_section(methods, images):
    rows = accuracy_rows(methods, images)
    content = scrolled(grid(ACCURACY_HEADS, rows)) if rows else "<p>None yet.</p>"
    return section(f"Accuracy on {IMAGES[images]}, %", content)


def markdown(methods, images):
    """The table of `accuracy_section` in Markdown."""
    lines = [ACCURACY_HEADS, ["---"] * len(ACCURACY_HEADS), *accuracy_rows(methods, images)]
    table = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    return f"Accuracy on {IMAGES[images]}, %:\n\n{table}\n"


def accuracy_rows(methods, images):
    """A row for each method with accuracies on these images, under `ACCURACY_HEADS`."""
    chance = next((method.accuracies(images) for method in methods if method.label == CHANCE), [])
    rows = []
    for method in methods:
        values = method.accuracies(images)
        if values:
            mean = mean_interval(values)
            sd = f"{statistics.stdev(values):.2f}" if len(values) > 1 else NONE
            selected = method.of_selected(images)
            less = difference_interval(values, chance) if chance and method.label != CHANCE else None
            rows.append(
                [
                    method.label,
                    len(values),
                    f"{mean.value:.2f}",
                    sd,
                    between(mean),
                    NONE if selected is None else f"{selected:.2f}",
                    f"{less.value:+.2f}" if less else NONE,
                    between(less, "+.2f") if less else NONE,
                ]
            )
    return rows


def between(interval, form=".2f"):
    return NONE if interval.low is None else f"{interval.low:{form}} to {interval.high:{form}}"


COST_HEADS = [
    "method",
    "parameters, M",
    "multiply-adds, M",
    "skip connections, normal",
    "hours of searches",
    "of trainings",
]


def cost_row(method):
    """Means over the members of what their networks cost, and the hours of all of their runs."""
    trained = [member for member in method.members if "parameters_M" in member]
    searches = [member["search"]["seconds"] for member in method.members if "search" in member]
    trainings = [run["seconds"] for m in trained for run in (m["selection"], *m["final"])]
    skips = [member["skip_connections"]["normal"] for member in method.members if "skip_connections" in member]
    return [
        method.label,
        *(f"{statistics.fmean(m[name] for m in trained):.3g}" if trained else NONE for name in NETWORK_COSTS),
        f"{statistics.fmean(skips):.1f}" if skips else NONE,
        f"{sum(searches) / 3600:.2f}" if searches else NONE,
        f"{sum(trainings) / 3600:.2f}",
    ]


NETWORK_COSTS = ("parameters_M", "multiply_adds_M")
MEMBER_HEADS = [
    *("method", "member", "seed", "held-out, %", "test, %", "parameters, M", "multiply-adds, M", "skips, normal"),
    *("eigenvalue", "the search's verdict"),
]


def members_table(methods):
    rows = []
    for method in methods:
        for member in method.members:
            search = member.get("search", {})
            tests = ", ".join(f"{run['test_top1']:.2%}".rstrip("%") for run in member.get("final", []))
            eigenvalue = search.get("eigenvalue")
            rows.append(
                [
                    method.label,
                    member["name"],
                    NONE if member["seed"] is None else member["seed"],
                    f"{100 * member['held_out_top1']:.2f}" if "held_out_top1" in member else NONE,
                    tests or NONE,
                    *(f"{member[name]:.3g}" if name in member else NONE for name in NETWORK_COSTS),
                    member.get("skip_connections", {}).get("normal", NONE),
                    NONE if eigenvalue is None else f"{eigenvalue:.3g}",
                    search.get("verdict", NONE),
                ]
            )
    return scrolled(grid(MEMBER_HEADS, rows))


def grid(heads, rows):
    """A table with a row of heads; the first column names the row."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    lines = [
        f"<tr><th>{html.escape(str(name))}</th>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    ]
    return f'<table class="grid"><tr>{head}</tr>{"".join(lines)}</table>'


# Cells and options


def cells_section(method):
    """All cells of a method, folded."""
    parts = []
    for member in method.members:
        if member["genotype"]:
            genotype = from_str(member["genotype"])
            top1 = f", {100 * member['held_out_top1']:.2f} %" if "held_out_top1" in member else ""
            parts.append(f"<h3>{html.escape(member['name'] + top1)}</h3>")
            parts += [drawing(kind, getattr(genotype, kind), getattr(genotype, f"{kind}_concat")) for kind in KINDS]
    return section(f"Cells: {method.label}", "".join(parts), folded=True)


def options_section(results):
    runs = [run for m in results["members"] for kind in KINDS_OF_RUNS for run in runs_of(m, kind)]
    origins = sorted({f"{run['version']}; {run['machine']}" for run in runs})
    rows = [(f"search: {name}", value) for name, value in (results["search_options"] or {}).items()]
    rows += [(f"training: {name}", value) for name, value in results["training_options"].items()]
    return section(
        f"Options of {results['label']}", table([*(("run by", origin) for origin in origins), *rows]), folded=True
    )
