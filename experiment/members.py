"""The members of a protocol, the runs that each of them takes, and which of these are over.

This module does not import torch, so that protocol.py starts at once.
"""

import functools
import itertools
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from experiment.protocol_options import ProtocolOptions
from genotypes import random_genotypes, resolve
from models.spaces import SPACES
from run.folder import RunFolder, read_json
from run.options import MAY_CHANGE, option_name

ROOT = Path(__file__).resolve().parent.parent
MAY_DIFFER = {*MAY_CHANGE, "runs_path"} - {"epochs"}  # options that don't change what a run computes


def check_options(folder: Path | RunFolder, saved: dict, options: dict, may_differ: Collection[str]) -> None:
    """Raise UserError unless the saved options of a run or a protocol are these, except for those in `may_differ`."""
    for name, value in options.items():
        if name not in may_differ and saved.get(name, value) != value:
            difference = f"--{option_name(name)} {saved[name]}, not {value}"
            raise UserError(f"{folder} was started with {difference}; choose another --name")


def fingerprints(summary: dict) -> dict[str, str]:
    """The fingerprints of a run's images, from its summary.json: of "training", and of "held_out" or "test" images."""
    end = "_fingerprint"
    return {name.removesuffix(end): value for name, value in summary.items() if name.endswith(end)}


@dataclass(frozen=True)
class Task:
    """A run of search.py or augment.py.

    kind: "search", "selection" or "final"; name: the name of the run's folder; words: its command line.
    """

    kind: str
    name: str
    words: tuple[str, ...]

    @functools.cached_property
    def config(self) -> SearchConfig | AugmentConfig:
        return (SearchConfig if self.kind == "search" else AugmentConfig)(self.words)

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / f"{self.config.stage}.py"), *self.words, "--auto-resume"]

    def summary(self) -> dict | None:
        """The content of the run's summary.json; None before its end. Raises UserError if it had other options."""
        folder = self.config.folder()
        summary, saved = read_json(folder.summary), read_json(folder.config)
        if summary is None or saved is None:
            return None
        check_options(folder, saved, self.config.as_dict(), MAY_DIFFER)
        return summary


@dataclass(frozen=True)
class Member:
    """A cell of the protocol.

    kind: "search", "random" or "published"; seed: of the search or of the random cell; genotype: None for a search.
    """

    name: str
    kind: str
    seed: int | None
    genotype: str | None


class Plan:
    """All runs of a protocol: searches, a selection training of each member, and final trainings.

    In a space whose cells have published accuracies, there are only searches.

    options: of protocol.py; folder: of the protocol, which has the runs' folders in it.
    """

    def __init__(self, options: ProtocolOptions, folder: Path):
        self.options, self.folder = options, folder
        self._summaries: dict[Task, dict] = {}  # of the runs that are over
        self.search_config = search = SearchConfig([*options.shared, *options.search])
        self.training_config = AugmentConfig([*options.shared, *options.augment, "--genotype", "DARTS_V2"])
        self.space = SPACES[search.space]
        self.truth_known = bool(self.space.truth_marks())  # then nothing is trained
        if self.truth_known and (options.augment or options.cells):
            raise UserError(
                f"--augment and --cells have no effect with --space {search.space}, where nothing is trained"
            )
        if self.truth_known:
            names = ("select_epochs", "hold_out", "final_seeds", "finals")
            options.refuse_without_effect(names, f"with --space {search.space}, where nothing is trained")
        self.members = [Member(f"search-{i}", "search", options.seed + i, None) for i in range(1, options.searches + 1)]
        for i in range(1, options.random + 1):
            seed = options.seed + i
            (cell,) = random_genotypes(1, seed, self.space, search.nodes, search.primitives)
            self.members.append(Member(f"random-{i}", "random", seed, str(cell)))
        self.members += [Member(name, "published", None, str(resolve(name))) for name in options.cells]

    def search(self, member: Member) -> Task:
        return self._task("search", member.name, *self.options.search, "--seed", member.seed)

    def selection(self, member: Member) -> Task:
        """The short training whose accuracy on held-out training images selects the best cell."""
        options = self.options
        conditions = ("--epochs", options.select_epochs, "--hold-out", options.hold_out)
        return self._training("selection", f"{member.name}-selection", member, options.seed, *conditions)

    def final(self, member: Member, seed: int) -> Task:
        """The training in full, whose accuracy is measured on the test images."""
        return self._training("final", f"{member.name}-final-seed-{seed}", member, seed)

    def _training(self, kind, name, member, seed, *conditions):
        genotype = self.genotype(member)
        return self._task(kind, name, *self.options.augment, "--genotype", genotype, "--seed", seed, *conditions)

    def _task(self, kind, name, *words):
        words = (*self.options.shared, *words, "--name", name, "--runs-path", self.folder)
        return Task(kind, name, tuple(map(str, words)))

    def summary(self, task: Task) -> dict | None:
        """`Task.summary`. Raises UserError if another run of this kind had other images."""
        if task not in self._summaries and (summary := task.summary()):
            for other, known in self._summaries.items():
                if task.kind == other.kind and fingerprints(summary) != fingerprints(known):
                    raise UserError(
                        f"{task.name} has other images than {other.name}; delete the folder of the one without those "
                        "in --data-path, or choose another --name"
                    )
            self._summaries[task] = summary
        return self._summaries.get(task)

    def genotype(self, member: Member) -> str | None:
        """The member's genotype; None before the end of its search."""
        if member.kind != "search":
            return member.genotype
        summary = self.summary(self.search(member))
        return summary and summary["genotype"]

    def held_out_top1(self, member: Member) -> float | None:
        """The accuracy on the held-out images after the selection training; None before its end."""
        summary = self.genotype(member) and self.summary(self.selection(member))
        return summary and summary["held_out_top1"]

    def best(self, kind: str) -> Member | None:
        """The member of a kind that has the best accuracy on the held-out images, the first of equal ones."""
        selected = [m for m in self.members if m.kind == kind and self.held_out_top1(m) is not None]
        return max(selected, key=self.held_out_top1, default=None)

    def finals(self) -> list[tuple[Member | None, int]]:
        """Members to be trained in full, each with its seeds. None stands for one that is not selected yet."""
        if self.truth_known:
            return []
        members, first_seed = self.members, self.options.seed + 1
        if self.options.finals == "best":
            best = [self.best(kind) for kind in ("search", "random") if any(m.kind == kind for m in members)]
            members = best + [member for member in members if member.kind == "published"]
        return list(itertools.product(members, range(first_seed, first_seed + self.options.final_seeds)))

    def jobs(self) -> list[list[Task]]:
        """The runs of each job for --member. Runs that depend on results that are not there yet are left out.

        A job is either a member's search and selection training, or one final training.
        """
        jobs = []
        for member in self.members:
            search = [self.search(member)] if member.kind == "search" else []
            selection = [self.selection(member)] if self.genotype(member) and not self.truth_known else []
            jobs.append(search + selection)
        for member, seed in self.finals():
            jobs.append([self.final(member, seed)] if member and self.genotype(member) else [])
        return jobs

    def next_task(self, job: int) -> Task | None:
        """The first run of a job that is not over; None if there is none, or none is known yet."""
        return next((task for task in self.jobs()[job - 1] if self.summary(task) is None), None)

    def job_numbers(self) -> str:
        """What the numbers for --member mean."""
        n_members, n_jobs = len(self.members), len(self.jobs())
        if self.truth_known:
            return f"jobs 1 to {n_members} are the members"
        return f"jobs 1 to {n_members} are the members, {n_members + 1} to {n_jobs} final trainings, which come last"

    def check_job(self, job: int) -> None:
        """Raise UserError unless --member may have this number, and the job can run now."""
        waits = job > len(self.members) and any(self.held_out_top1(member) is None for member in self.members)
        if waits or job > len(self.jobs()):
            raise UserError(f"--member {job} can't run now: {self.job_numbers()}")
