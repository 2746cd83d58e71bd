"""The options of protocol.py, and among them those of search.py and augment.py in quotes."""

import argparse
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from command_line.errors import UserError
from config import AugmentConfig, DataOptions, SearchConfig
from genotypes import PUBLISHED
from run.options import (
    RunOptions,
    folder_name,
    gpus,
    hyphenate,
    natural,
    number,
    option,
    option_name,
    path,
    positive_int,
    words_of,
)

CHANCE = "random cells"  # the label of random cells in tables

up_to_1000 = number(int, 0, 1000)
fraction = number(float, 0, 1, low_open=True, high_open=True)

SHARED = (*DataOptions.default_values({}), "device")  # options of both scripts that are given to protocol.py itself
SET_HERE = ("name", "runs_path", "overwrite", "resume", "auto_resume", "seed", "gpus")  # for each run, by protocol.py
SET_HERE_TO_AUGMENT = (*SET_HERE, "genotype", "hold_out", "evaluate", "mirror", "init_checkpoint")


@dataclass(init=False)
class ProtocolOptions(DataOptions):
    """Search, select, train in full, and compare with random and published cells."""

    searches: int = option(4, "number of searches, with the seeds S+1, S+2, ...", up_to_1000, "members")
    random: int = option(4, "number of random cells from the search space, with the same seeds", up_to_1000)
    cells: list[str] = option([], "published cells", choices=PUBLISHED, nargs="*")  # noqa: RUF009
    seed: int = option(0, "seed S", natural)

    search: str = option("", 'options of search.py in quotes, such as "--order first"', group="stages")
    augment: str = option("", 'options of augment.py in quotes, such as "--layers 8"')
    select_epochs: int = option(100, "epochs of the trainings that select a cell", positive_int)
    hold_out: float = option(0.1, "fraction of the training images whose accuracy selects a cell", fraction)
    final_seeds: int = option(1, "number of final trainings of a cell, with the seeds S+1, S+2, ...", up_to_1000)
    finals: str = option(
        "best",
        "cells of final trainings: the best search, the best random and each published; or all",
        choices=("best", "all"),
    )

    name: str | None = option(None, "name of the folder (default: the data set)", folder_name, "run")
    runs_path: str = option("runs", "folder of all runs; the protocol's is in its subfolder protocol", path)
    label: str | None = option(None, "label of the searches in tables (default: the name)")
    device: str = option("auto", "device of each run: auto (CUDA if there is a GPU), cpu, cuda, cuda:1, ...")
    gpus: str | None = option(None, "GPUs of this machine to use, with one run at a time on each: 0,1,2 or all", gpus)
    member: int | None = option(None, "only member to run, or only final training, for job arrays", positive_int)

    def check(self):
        super().check()
        if self.gpus and self.device != "auto":
            raise UserError("--gpus chooses the devices; leave --device out")
        if not self.searches + self.random + len(self.cells):
            raise UserError("there is nothing to run: give some of --searches, --random and --cells")
        if len(set(self.cells)) < len(self.cells):
            raise UserError("--cells must be different cells")
        if not self.final_seeds:
            self.refuse_without_effect(("finals",), "without final trainings")


def read_options(argv: Iterable[str]) -> ProtocolOptions:
    """The options, with `search` and `augment` as words, and in addition `shared`, the words for both scripts."""
    words = list(joined(map(hyphenate, argv)))
    options = ProtocolOptions(words)
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # where runs are, and not what they are
    place.add_argument("--member")
    place.add_argument("--gpus")
    options.command = shlex.join(["python", "protocol.py", *place.parse_known_args(words)[1]])
    options.shared = words_of(options.changed(SHARED))
    options.search = quoted(SearchConfig, options.search, SET_HERE, "--search")
    options.augment = quoted(AugmentConfig, options.augment, SET_HERE_TO_AUGMENT, "--augment")
    options.label = options.label or options.name or options.dataset
    return options


def joined(words: Iterable[str]) -> Iterator[str]:
    """The words with `--search X` as `--search=X`, since argparse takes an X that begins with `-` for an option."""
    words = iter(words)
    for word in words:
        value = next(words, None) if word in ("--search", "--augment") else None
        yield word if value is None else f"{word}={value}"


def quoted(config: type[RunOptions], text: str, set_here: Iterable[str], option: str) -> list[str]:
    """The words in an option's value. Raises UserError for what doesn't belong there."""
    try:
        words = shlex.split(text)
        for name in config.parse(words):
            if name in SHARED:
                raise UserError(f"--{option_name(name)} is given once, to protocol.py itself")
            if name in set_here:
                raise UserError(f"--{option_name(name)} is set by protocol.py, for each run")
        config([*words, *["--genotype", "DARTS_V2"] * (config is AugmentConfig)])  # options that contradict each other
    except ValueError as error:  # a UserError, or shlex's
        raise UserError(f"{option}: {error}") from None
    return words
