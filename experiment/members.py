"""The members of a protocol: the runs that each takes, and what came of them.

This module does not import torch, so that protocol.py starts at once.
"""

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from evidence.search_state import skip_connections
from genotypes import PUBLISHED, from_str, random_genotypes, resolve
from run.folder import RunFolder, read_json
from run.forms import PLAIN, TEXT, Optional, maybe, misfit, real, whole
from run.options import MAY_CHANGE, option_name

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"search": SearchConfig, "augment": AugmentConfig}
FREE = {*MAY_CHANGE, "runs_path"} - {"epochs"}  # options that a run may have others of, and be the same run

# The forms of a run's summary.json and of a protocol's results.json, see run/forms.py
FRACTION = real(0, 1)
ORIGIN = {"seconds": real(0), "version": TEXT, "machine": TEXT, "fingerprints": {str: str}}
OF_SEARCH = {"epochs": whole(1), "valid_top1": FRACTION, "verdict": str, "eigenvalue": maybe(float)}
OF_NETWORK = {"parameters_M": real(0), "multiply_adds_M": real(0), "held_out_top1": FRACTION}
SUMMARIES = {
    kind: {"epochs": whole(1), "seconds": real(0), str: PLAIN} | form
    for kind, form in {
        "search": OF_SEARCH | {"genotype": str},
        "selection": OF_NETWORK,
        "final": {"test_top1": FRACTION},
    }.items()
}
MEMBER = {
    "name": str,
    "kind": lambda value: value in ("search", "random", "published"),
    "seed": maybe(whole(0)),
    "genotype": TEXT,
    Optional("search"): OF_SEARCH | ORIGIN,
    Optional("skip_connections"): {"normal": whole(0), str: whole(0)},
    Optional("final"): [{"seed": whole(0), "test_top1": FRACTION} | ORIGIN],
}
TRAINED_MEMBER = MEMBER | OF_NETWORK | {"selection": ORIGIN, "final": MEMBER[Optional("final")]}
RESULTS = {
    "format": lambda value: value == 2,
    "label": lambda value: type(value) is str and is_label(value),
    "like": TEXT,
    "command": str,
    "finals": lambda value: value in ("best", "all"),
    "search_options": maybe({str: PLAIN}),
    "search_space": {"nodes": whole(1), "primitives": str},
    "training_options": {"hold_out": FRACTION, str: PLAIN}
    | dict.fromkeys(("dataset", "layers", "init_channels", "select_epochs", "epochs"), PLAIN),
    "members": [lambda value: misfit(value, MEMBER) is None or misfit(value, TRAINED_MEMBER) is None],
    str: lambda value: True,
}
CHANCE = "random cells"  # the label of random cells in tables
LOG_TAIL = 4096  # bytes in which the last line of progress is looked for


def is_label(text):
    """Whether searches may be called so in tables, where random and published cells have rows of their own."""
    return text.isprintable() and "|" not in text and not text.startswith(CHANCE) and text not in PUBLISHED


def fingerprints(summary):
    """Those of a run's images, from its summary.json: training, held_out or test -> text. Old versions wrote none."""
    end = "_fingerprint"
    return {name.removesuffix(end): str(value) for name, value in summary.items() if name.endswith(end)}


def have_other_images(kind, ours, other_kind, others):
    """Whether runs of these kinds are known to have different images: their `fingerprints` of the same images differ.

    A selection trains on fewer images than a search or a final training.
    """
    names = ours.keys() & others.keys() if (kind == "selection") == (other_kind == "selection") else ()
    return any(ours[name] != others[name] for name in names)


@dataclass(frozen=True)
class Task:
    """A run of search.py or augment.py.

    kind: search, selection or final; name: of its folder, RUNS_PATH/STAGE/NAME; words: its other options; part: the
    number for --member.
    """

    kind: str
    name: str
    words: tuple
    runs_path: Path
    part: int

    @property
    def stage(self):
        return "search" if self.kind == "search" else "augment"

    @functools.cached_property
    def config(self):
        return CONFIGS[self.stage]([*self.words, "--name", self.name, "--runs-path", str(self.runs_path)])

    @property
    def folder(self):
        return RunFolder(self.runs_path / self.stage / self.name)

    def command(self):
        words = [*self.words, "--name", self.name, "--runs-path", str(self.runs_path), "--auto-resume"]
        return [sys.executable, str(ROOT / f"{self.stage}.py"), *words]

    def summary(self):
        """The results of the run; None before its end. Raises UserError if the folder has a run with other options."""
        summary = read_json(self.folder.summary)
        saved = read_json(self.folder.config)
        if not summary or not saved:
            return None
        found = misfit(summary, SUMMARIES[self.kind], "summary") or misfit(saved, {str: PLAIN}, "config")
        if found:
            raise UserError(f"{self.folder} holds files that are no run's: {found}")
        saved = vars(self.config.restored(saved, self.folder.config))
        for name, value in self.config.as_dict().items():
            if name not in FREE and saved[name] != value:
                raise UserError(
                    f"{self.folder} is of a run with --{option_name(name)} {saved[name]}, not {value}; choose another "
                    "--name"
                )
        return summary

    def epochs_done(self):
        """How many epochs the run has gone through, as a fraction of its last one too, by its log."""
        try:
            with open(self.folder.log, "rb") as log:
                log.seek(max(0, self.folder.log.stat().st_size - LOG_TAIL))
                lines = log.read().decode(errors="replace")
        except OSError:
            return 0.0
        found = re.findall(r"  epoch (\d+)/\d+  (\S+)  (?:step (\d+)/(\d+))?", lines)
        if not found:
            return 0.0
        epoch, phase, step, steps = found[-1]
        done = int(step) / int(steps) if step else 1.0
        return int(epoch) - 1 + (done if phase == "train" else 1.0)


@dataclass(frozen=True)
class Member:
    """A cell of the protocol.

    kind: search, random or published; seed: of its search, or of the random cell; genotype: None for a search.
    """

    name: str
    kind: str
    seed: int | None
    genotype: str | None


class Plan:
    """All runs of a protocol: a search for each member that needs one, a selection training, and final trainings.

    options: of protocol.py; folder: of the protocol, in which the runs' folders are.
    """

    def __init__(self, options, folder):
        self.options, self.folder = options, Path(folder)
        self._over = {}  # task -> its summary, which does not change any more
        self.seeds = [options.seed + k for k in range(1, options.final_seeds + 1)]
        config = SearchConfig(options.search)
        self.space = {"nodes": config.nodes, "primitives": config.primitives}  # of the searches and the random cells
        self.training = AugmentConfig([*options.shared, *options.augment, "--genotype", "DARTS_V2"])  # of any cell
        like = options.like and resolve(options.like)
        words = like, config.nodes, config.primitives.split(","), self.training
        seeds = range(options.seed + 1, options.seed + options.random + 1)
        drawn = [random_genotypes(1, seed, *words)[0] for seed in seeds]
        self.members = [
            *(Member(f"search-{i}", "search", options.seed + i, None) for i in range(1, options.searches + 1)),
            *(Member(f"random-{i}", "random", options.seed + i, str(cell)) for i, cell in enumerate(drawn, 1)),
            *(Member(name, "published", None, str(resolve(name))) for name in options.cells),
        ]

    # The runs

    def search(self, member):
        """The member's search, or None."""
        if member.kind != "search":
            return None
        words = (*self.options.shared, *self.options.search, "--seed", str(member.seed))
        return Task("search", member.name, words, self.folder, self.members.index(member) + 1)

    def genotype(self, member):
        """The member's genotype as a string; None before the end of its search."""
        search = self.search(member)
        summary = self.summary(search) if search else {"genotype": member.genotype}
        return summary and summary["genotype"]

    def selection(self, member):
        """The short training by which the best cell is selected; None before the end of the member's search."""
        genotype = self.genotype(member)
        if genotype is None:
            return None
        epochs = ("--epochs", str(self.options.select_epochs), "--hold-out", str(self.options.hold_out))
        words = (*self._training(genotype, self.options.seed), *epochs)
        return Task("selection", f"{member.name}-selection", words, self.folder, self.members.index(member) + 1)

    def final(self, member, seed, part=0):
        """The training in full with this seed; its accuracy is on the test images."""
        words = self._training(self.genotype(member), seed)
        return Task("final", f"{member.name}-final-seed-{seed}", words, self.folder, part)

    def _training(self, genotype, seed):
        return (*self.options.shared, *self.options.augment, "--genotype", genotype, "--seed", str(seed))

    # What is over, selection, and what is left

    def summary(self, task):
        """The results of a run; None before its end.

        Raises UserError as `Task.summary`, and if other runs had other images.
        """
        if task not in self._over and (summary := task.summary()):
            for other, known in self._over.items():
                if have_other_images(task.kind, fingerprints(summary), other.kind, fingerprints(known)):
                    raise UserError(
                        f"{task.folder} is of other images than {other.folder}; delete the one that is not of "
                        "--data-path, or choose another --name"
                    )
            self._over[task] = summary
        return self._over.get(task)

    def held_out_top1(self, member):
        """The accuracy on the held-out images after the selection training; None before its end."""
        selection = self.selection(member)
        summary = selection and self.summary(selection)
        return summary and summary["held_out_top1"]

    def best(self, kind):
        """The member of a kind with the best accuracy on the held-out images, the first of equal ones; or None."""
        known = {m: self.held_out_top1(m) for m in self.members if m.kind == kind}
        known = {member: top1 for member, top1 in known.items() if top1 is not None}
        return max(known, key=known.get, default=None)

    def finalists(self):
        """The members to be trained in full, None for one that is not known; as many before the selection as after."""
        if self.options.finals == "all":
            return list(self.members)
        kinds = [kind for kind in ("search", "random") if any(member.kind == kind for member in self.members)]
        return [*map(self.best, kinds), *(member for member in self.members if member.kind == "published")]

    def tasks(self, failed=()):
        """The runs that are known so far, in order. Those of the finalists are, once no selection training is left.

        failed: names of runs that are not waited for.
        """
        known = [task for member in self.members for task in (self.search(member), self.selection(member)) if task]
        waited_for = [
            member
            for member in self.members
            if self.held_out_top1(member) is None and not {member.name, f"{member.name}-selection"} & set(failed)
        ]
        if not waited_for:
            finals = [(member, seed) for member in self.finalists() for seed in self.seeds]
            part = len(self.members) + 1
            known += [
                self.final(*pair, part + i) for i, pair in enumerate(finals) if pair[0] and self.genotype(pair[0])
            ]
        return known

    def check_part(self, part):
        """Raise UserError unless there is a part of this number for --member, and it can run now."""
        if part > len(self.members) + self.count_of("final"):
            raise UserError(f"--member {part}: there is no such part; {self.parts()}")
        if part > len(self.members) and part not in [task.part for task in self.tasks()]:
            raise UserError(f"--member {part} is a final training; it needs parts 1 to {len(self.members)} before it")

    def parts(self):
        """The numbers for --member, in words."""
        words, first = [], 1
        counts = {"search": "searches", "random": "random cells", "published": "published cells"}
        counts = {name: sum(member.kind == kind for member in self.members) for kind, name in counts.items()}
        for name, count in (counts | {"final trainings": self.count_of("final")}).items():
            if count:
                words.append(f"{first} to {first + count - 1} {name}" if count > 1 else f"{first} {name}")
            first += count
        return f"parts: {', '.join(words) or 'none'}"

    def epochs_of(self, kind):
        """Epochs of a run of a kind."""
        if kind == "search":
            return SearchConfig(self.options.search).epochs
        if kind == "selection":
            return self.options.select_epochs
        return self.training.epochs

    def count_of(self, kind):
        """The number of runs of a kind."""
        return {
            "search": self.options.searches,
            "selection": len(self.members),
            "final": len(self.finalists()) * len(self.seeds),
        }[kind]


def results_of(plan, version):
    """The content of results.json: what came of each member so far. Accuracies are fractions, times seconds."""
    options = plan.options
    conditions = plan.training.as_dict()
    for name in ("genotype", "name", "runs_path", "seed", "hold_out", "checkpoint_minutes", *FREE):
        conditions.pop(name, None)
    search_options = SearchConfig([*options.shared, *options.search]).as_dict()
    for name in ("name", "runs_path", "seed", "checkpoint_minutes", *FREE):
        search_options.pop(name, None)
    best = {kind: plan.best(kind) for kind in ("search", "random")}
    return {
        "format": 2,
        "label": options.label,
        "like": options.like,
        "command": options.command,
        "finals": options.finals,
        "version": version,
        "search_options": search_options if options.searches else None,
        "search_space": plan.space,
        "training_options": conditions
        | {"hold_out": options.hold_out, "select_epochs": options.select_epochs, "select_seed": options.seed},
        "selected": {kind: member and member.name for kind, member in best.items()},
        "members": [_result_of(plan, member) for member in plan.members],
    }


def _result_of(plan, member):
    search, genotype = plan.search(member), plan.genotype(member)
    result = {"name": member.name, "kind": member.kind, "seed": member.seed, "genotype": genotype}
    found = search and plan.summary(search)
    if found:
        names = ("epochs", "valid_top1", "verdict", "eigenvalue")
        result["search"] = {name: found[name] for name in names} | _origin(found)
    if genotype:
        result["skip_connections"] = {
            kind: skip_connections(getattr(from_str(genotype), kind)) for kind in ("normal", "reduce")
        }
        selection = plan.summary(plan.selection(member))
        if selection:
            result |= {name: selection[name] for name in ("parameters_M", "multiply_adds_M", "held_out_top1")}
            result["selection"] = _origin(selection)
        is_finalist = member in plan.finalists()
        finals = {seed: plan.summary(plan.final(member, seed)) for seed in plan.seeds * is_finalist}
        result["final"] = [
            {"seed": seed, "test_top1": summary["test_top1"]} | _origin(summary)
            for seed, summary in finals.items()
            if summary
        ]
    return result


def _origin(summary):
    return {name: summary.get(name) for name in ("seconds", "version", "machine")} | {
        "fingerprints": fingerprints(summary)
    }
