"""Options: how they are declared, read from the command line, saved with a run, and read back when it is resumed.

An option is a field of a dataclass, made by `option`. config.py says which options search.py and augment.py have.
"""

import argparse
import dataclasses
import inspect
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from command_line.errors import UserError, is_rank_0, shell_quote, user_errors_in_one_line
from run.folder import RunFolder, read_json, reading

MAX_NUMBER = 2**31 - 1  # the largest value of any option
MAY_CHANGE = ("epochs", "workers", "device", "print_freq", "data_path")  # with --resume; all other options are fixed
MAY_CHANGE_IN_WORDS = ", ".join(f"--{name.replace('_', '-')}" for name in MAY_CHANGE)
NOT_SAVED = ("resume", "auto_resume", "overwrite", "gpus", "evaluate", "predict", "mirror")  # not in config.json


# Types of options: functions that read a text, and raise argparse.ArgumentTypeError if it is not allowed


def number(kind: type, low: float, high: float = MAX_NUMBER, low_open=False, high_open=False) -> Callable[[str], Any]:
    """A type: an int or float (`kind`) within bounds, which are allowed themselves unless they are `open`."""
    name = {int: "a whole number", float: "a number"}[kind]
    bounds = f"{'above' if low_open else 'of at least'} {low} and {'below' if high_open else 'at most'} {high}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (low_open and value == low) or (high_open and value == high):
            raise argparse.ArgumentTypeError(f"must be {name} {bounds}, not {text!r}")
        return value

    return read


positive_int = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, low_open=True)
nonnegative = number(float, 0)
probability = number(float, 0, 1, high_open=True)  # below 1: drop path divides by 1 - p
path = os.path.expanduser  # any text, in which ~ at the start stands for the home folder


def folder_name(text: str) -> str:
    """A type: the name of a folder. Not a path, since --overwrite deletes the folder."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"must be the name of a folder, without slashes, not {text!r}")
    return text


def gpus(text: str) -> str:
    """A type: `all`, or the numbers of CUDA devices."""
    numbers = text.split(",")
    if text != "all" and (not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers)):
        raise argparse.ArgumentTypeError(f"must be all, or different numbers such as 0,1,2, not {text!r}")
    return text


# Options in general


def option(default: Any, help: str, type: Callable = str, group: str | None = None, **settings) -> Any:
    """A field of a dataclass that is an option of the command line; one whose default is False is a switch.

    help: a noun phrase, or for a switch a verb; type: reads the text; group: the title in --help of this option and of
    those after it; settings: of `add_argument`, such as choices.
    """
    metavar = {int: "N", float: "X"}.get(default.__class__) if "choices" not in settings else None
    settings |= {"default": default, "help": help, "type": type, "metavar": metavar, "group": group}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=settings)
    return dataclasses.field(default=default, metadata=settings)


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s."""

    def error(self, message):
        raise UserError(message)


class Options:
    """Options as attributes. argv: the words of the command line; None: those of `sys.argv`.

    A subclass is a dataclass of `option`s, and has those of the classes that it inherits from too. Raises UserError if
    the words are not allowed, or contradict each other.
    """

    def __init__(self, argv: Iterable[str] | None = None):
        vars(self).update(self.values(self.parse(sys.argv[1:] if argv is None else argv)))
        self.check()

    def check(self):
        """Raise UserError if options contradict each other, or if one has no effect and not its default."""

    @classmethod
    def groups(cls, given: dict) -> dict[str, list[dataclasses.Field]]:
        """title -> options, for each group of --help. given: name -> value of options on the command line."""
        groups, title = {}, None
        for kind in cls.__mro__:
            for name in inspect.get_annotations(kind):
                field = kind.__dataclass_fields__[name]
                title = field.metadata["group"] or title
                groups.setdefault(title, []).append(field)
        return groups

    @classmethod
    def build_parser(cls, given: dict | None = None, add_help: bool = True) -> OptionParser:
        """A parser that returns the options on the command line only, without the defaults of others."""
        parser = OptionParser(description=cls.__doc__.splitlines()[0], allow_abbrev=False, add_help=add_help)
        for title, fields in cls.groups(given or {}).items():
            group = parser.add_argument_group(title)
            for field in fields:
                settings = dict(field.metadata)
                default, _ = settings.pop("default"), settings.pop("group")
                if default is False:
                    settings = {"help": settings["help"], "action": "store_true"}
                elif default is not None and not isinstance(default, list):
                    settings["help"] += f" (default: {default})"
                settings["help"] = settings["help"].replace("%", "%%")
                group.add_argument(f"--{option_name(field.name)}", default=argparse.SUPPRESS, **settings)
        return parser

    @classmethod
    def parse(cls, words: Iterable[str]) -> dict:
        """name -> value of the options in the words. Prints the help and exits if they ask for it."""
        words = [hyphenate(word) for word in words]
        given, _ = cls.build_parser(add_help=False).parse_known_args(words)  # on which the groups may depend
        given, unknown = cls.build_parser(vars(given)).parse_known_args(words)
        if unknown:
            raise UserError(cls.about_unknown(unknown[0]))
        return vars(given)

    @classmethod
    def about_unknown(cls, word: str) -> str:
        """The error message for a word that belongs to no option."""
        return f"unrecognized arguments: {word} (see --help)"

    @classmethod
    def default_values(cls, given: dict) -> dict:
        """name -> default of each option. given: name -> value of options on which others may depend."""
        fields = itertools.chain(*cls.groups(given).values())
        return {field.name: field.metadata["default"] for field in fields}

    @classmethod
    def values(cls, given: dict) -> dict:
        """name -> value of each option. given: those of the command line."""
        return cls.default_values(given) | given

    @classmethod
    def defaults(cls) -> SimpleNamespace:
        """The options that an empty command line gives, as attributes."""
        return SimpleNamespace(**cls.default_values({}))

    def changed(self, names: Iterable[str]) -> dict:
        """name -> value of those of these options that do not have their default."""
        defaults = self.default_values(vars(self))
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def refuse_without_effect(self, names: Iterable[str], reason: str):
        """Raise UserError if one of these options does not have its default. reason: why it has no effect."""
        for name in self.changed(names):
            raise UserError(f"--{option_name(name)} has no effect {reason}; leave it out")


@dataclass(init=False)
class RunOptions(Options):
    """The options that every run has, how they are saved, and how a run is resumed."""

    stage = None  # "search" or "augment": the name of the folder that contains the run's folder

    name: str | None = option(None, "name of the run's folder (default: the data set)", folder_name, "run")
    runs_path: str = option("runs", "folder of all runs; a run has its own in the subfolder search or augment", path)
    overwrite: bool = option(False, "replace the run that the folder holds, if there is one")
    resume: str | None = option(
        None,
        f"folder of a run to continue, or a checkpoint in it; of other options only --gpus and {MAY_CHANGE_IN_WORDS} "
        "may be given with it",
        path,
    )
    auto_resume: bool = option(False, "continue the run of this name if there is one, as torchrun's restarts need")
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints in an epoch; 0: at each step", nonnegative)
    seed: int = option(2, "seed of everything that is random", natural)
    device: str = option("auto", "device of the run: auto (CUDA if there is a GPU), cpu, cuda, cuda:1, ...")
    gpus: str | None = option(None, "GPUs of this machine to use, with a process for each: 0,1,2 or all", gpus)
    sync_bn: bool = option(False, "normalise by the statistics of the global batch, not of each rank's part")
    amp: bool = option(False, "compute in mixed precision: bfloat16 wherever PyTorch considers it safe")
    deterministic: bool = option(False, "make repeated runs on a GPU give the same bits, as they do on a CPU anyway")
    print_freq: int = option(50, "number of steps between two lines of the log", positive_int)

    def __init__(self, argv: Iterable[str] | None = None):
        super().__init__(argv)
        if self.auto_resume:
            folder = self.folder()
            if folder.config.is_file():
                self.resume = str(folder)

    def check(self):
        super().check()
        if self.auto_resume and (self.resume or self.overwrite):
            raise UserError("--auto-resume can't be given with --resume or --overwrite")
        if self.gpus and self.device != "auto":
            raise UserError("--gpus chooses the devices; leave --device out")

    @classmethod
    def values(cls, given: dict) -> dict:
        """name -> value of each option. With --resume: those of the run, updated by those in `MAY_CHANGE`."""
        if "resume" not in given:
            return super().values(given)
        folder = cls._resumed_folder(given["resume"])
        for name in given:
            if name not in (*MAY_CHANGE, "resume", "gpus"):
                raise UserError(
                    f"--{option_name(name)} is fixed by the run {folder}; --resume allows only --gpus and "
                    f"{MAY_CHANGE_IN_WORDS}"
                )
        folder.check()
        saved = read_json(folder.config)
        if saved is None:
            raise UserError(f"--resume {given['resume']}: no {cls.stage} run's {folder.config.name} in {folder}")
        with reading(folder.config):
            if (saved.get("order") is None) == (cls.stage == "search"):
                raise UserError(f"--resume {given['resume']}: {folder} is not a run of {cls.stage}.py")
            return vars(cls.restored(saved, folder.config)) | given

    @classmethod
    def restored(cls, saved: dict, source) -> Self:
        """The options of a run from their saved values, which pass the checks of the command line.

        An option that the run lacks has its default. source: the file, for error messages. Raises UserError if an
        option is unknown or has a value that is not allowed.
        """
        try:
            return cls(words_of(saved))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @staticmethod
    def _resumed_folder(resume):
        return RunFolder(Path(resume).parent if Path(resume).is_file() else resume)

    def folder(self) -> RunFolder:
        """The `RunFolder` of the run."""
        if self.resume is not None:
            return self._resumed_folder(self.resume)
        return RunFolder(Path(self.runs_path) / self.stage / (self.name or self.dataset))

    @classmethod
    def answer_help(cls):
        """Print the help and exit, if the command line asks for it."""
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            with user_errors_in_one_line(f"{cls.stage}.py"):
                if is_rank_0():
                    cls.parse(sys.argv[1:])
            sys.exit()

    def as_dict(self) -> dict:
        """The options that are saved with the run: all but those in `NOT_SAVED`."""
        return {name: value for name, value in vars(self).items() if name not in NOT_SAVED}

    def as_markdown(self) -> str:
        """The options as a Markdown table."""
        rows = [f"| {option_name(name)} | {as_text(value)} |" for name, value in sorted(self.as_dict().items())]
        return "\n".join(["| option | value |", "|---|---|", *rows])


def option_name(name: str) -> str:
    return name.replace("_", "-")


def as_text(value) -> str:
    """The value of an option as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def words_of(options: dict) -> list[str]:
    """The words of a command line that set these options."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{option_name(name)}")
        elif value is not None and value is not False:
            words.append(f"--{option_name(name)}={as_text(value)}")
    return words


def in_a_shell(options: dict) -> str:
    """The options as a part of a command that can be pasted into a shell."""
    words = []
    for name, value in options.items():
        words.append(f"--{option_name(name)}")
        if value is not True:
            words.append(shell_quote(as_text(value)))
    return " ".join(words)


def hyphenate(word: str) -> str:
    """Accept `--batch_size` for `--batch-size`: replace underscores in the option's name, not in its value."""
    name, equals, value = word.partition("=")
    return option_name(name) + equals + value if re.fullmatch(r"--\w[\w-]*", name) else word
