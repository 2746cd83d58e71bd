"""Options of a run: their types, and how they are read, saved with the run, and read back when it is resumed.

config.py says which options there are.
"""

import argparse
import math
import os
import re
import shlex
import sys
from pathlib import Path

from command_line.errors import OneLineParser, UserError, is_rank_0, shown
from run.folder import RunFolder, launcher, read_json

MAX_NUMBER = 2**31 - 1  # the largest value of any option
LONGEST_NAME = 240  # bytes; file systems allow 255, of which `RunFolder.replaced` adds some
MAY_CHANGE = ("epochs", "workers", "device", "print_freq", "data_path")  # with --resume; all other options are fixed
NOT_SAVED = ("resume", "auto_resume", "overwrite", "gpus", "evaluate", "mirror")  # not written to config.json


def number(kind, low, high=math.inf, low_open=False, high_open=False):
    """An argparse type: an int or float (`kind`) within bounds. The error message names the bounds."""
    names = {int: "a whole number", float: "a number"}
    bounds = f"{'above' if low_open else 'of at least'} {low}"
    if high < math.inf:
        bounds += f" and {'below' if high_open else 'at most'} {high}"

    def read(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        inside = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
        if not inside or (high == math.inf and not number <= MAX_NUMBER):
            limit = f" and at most {MAX_NUMBER}" if number > MAX_NUMBER and high == math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {names[kind]} {bounds}{limit}, not {text!r}")
        return number

    return read


positive_int = number(int, 1)
natural = number(int, 0)
positive = number(float, 0, low_open=True)
nonnegative = number(float, 0)
probability = number(float, 0, 1, high_open=True)  # below 1: drop path divides by 1 - p


def folder_name(text):
    """An argparse type: a folder name. Not a path, since --overwrite deletes the folder."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"must be the name of a folder, without slashes, not {text[:50]!r}")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"has characters that no name may have: {text[:50]!r}")
    if len(text.encode()) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"is longer than {LONGEST_NAME} bytes: {text[:50]!r}...")
    if text.startswith(".") and text.endswith(".replaced"):  # see RunFolder.replaced
        raise argparse.ArgumentTypeError(f"is kept for runs that are being replaced: {text!r}")
    return text


def gpus(text):
    """An argparse type: `all`, or CUDA devices' numbers."""
    numbers = text.split(",")
    if text != "all" and (not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers)):
        raise argparse.ArgumentTypeError(f"must be all, or different numbers as in 0,1,2, not {text!r}")
    return text


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of each option, unless it is None or False."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class RunOptions:
    """Options as attributes. argv: the command-line words; None: those of sys.argv.

    A subclass has the `stage`, and `add_options`; it may have `set_defaults` and `check`.
    """

    stage = None  # "search" or "augment": the name of the folder that contains the run's folder

    def __init__(self, argv=None):
        parser = self.build_parser()
        words = [hyphenate(word) for word in (sys.argv[1:] if argv is None else argv)]
        self.set_defaults(parser, words)
        options = parser.parse_args(words)
        if options.resume is not None:
            options = self._resume(parser, words, options)
        if options.auto_resume and (options.resume or options.overwrite):
            parser.error("--auto-resume can't be given with --resume or --overwrite")
        self.check(parser, options)
        vars(self).update(vars(options))
        if self._continues():
            self.resume, self.overwrite = str(self.folder()), False

    def _resume(self, parser, words, options):
        """The saved options of the run to be resumed, updated by those on the command line, of `MAY_CHANGE` only."""
        folder = self._resumed_folder(options.resume)
        unset = object()
        parsed = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(options), unset)))
        changed = {name: value for name, value in vars(parsed).items() if value is not unset and name != "resume"}
        for name in changed:
            if name not in (*MAY_CHANGE, "gpus"):
                allowed = ", ".join(f"--{option_name(other)}" for other in MAY_CHANGE)
                raise UserError(f"--{option_name(name)} is fixed by the run {folder}; --resume allows only {allowed}")
        folder.recover()
        folder.check()
        saved = read_json(folder.config) if folder.path.is_dir() else None
        if saved is None:
            raise UserError(f"--resume {options.resume}: no {self.stage} run's {folder.config.name} in {folder}")
        if not isinstance(saved, dict):
            raise UserError(f"--resume {options.resume}: {folder.config} is not of a {self.stage} run")
        return argparse.Namespace(**vars(self.restored(saved, folder.config)) | changed | {"resume": options.resume})

    @classmethod
    def restored(cls, saved, source):
        """The options of a run from their saved values, which pass the checks of the command line, as a Namespace.

        Options that did not exist when the run was saved get their defaults. source: the file, for error messages.
        Raises UserError if an option is not known, or says what a command does rather than what the run is, or has a
        value that the command line would refuse.
        """

        def refuse(message):
            raise UserError(f"{source}: {message}")

        parser = cls.build_parser()
        parser.error = refuse
        fixed = vars(cls.defaults()).keys() - set(NOT_SAVED)
        unknown = sorted(set(saved) - fixed)
        if unknown:
            raise UserError(
                f"{source} is not of a {cls.stage} run of this program: it has options that are not known here, "
                + ", ".join(unknown)
            )
        for name, value in saved.items():
            if type(value) not in (str, int, float, bool, type(None)) or not _is_possible(value):
                refuse(f"--{option_name(name)} can't be {shown(value)}")
        words = words_of(saved)
        cls.set_defaults(parser, words)
        options = parser.parse_args(words)
        for name, value in saved.items():
            if (value is None or value is False) and getattr(options, name) is not value:
                refuse(f"--{option_name(name)} can't be {value}")
        cls.check(parser, options)
        return options

    def _continues(self):
        """Whether to resume a run without --resume: with --auto-resume, or if torchrun restarts the ranks."""
        folder, is_torchrun = self.folder(), "TORCHELASTIC_RUN_ID" in os.environ
        if not self.auto_resume and not is_torchrun:
            return False
        folder.recover()
        if not folder.config.is_file():
            return False
        restarted = is_torchrun and folder.launcher.is_file() and folder.launcher.read_bytes() == launcher().encode()
        if not self.auto_resume and not restarted:
            return False
        folder.check()
        return True

    @staticmethod
    def _resumed_folder(resume):
        return RunFolder(Path(resume).parent if Path(resume).is_file() else resume)

    @staticmethod
    def set_defaults(parser, words):
        """Set the defaults that depend on other options. words: the command line."""

    @staticmethod
    def check(parser, options):
        """Call parser.error if options contradict each other."""

    def folder(self):
        """The `RunFolder` of the run."""
        if self.resume is not None:
            return self._resumed_folder(self.resume)
        return RunFolder(Path(self.runs_path) / self.stage / (self.name or self.dataset))

    @classmethod
    def build_parser(cls):
        parser = OneLineParser(
            description=cls.__doc__.splitlines()[0],
            formatter_class=HelpWithDefaults,
            allow_abbrev=False,
        )
        cls.add_options(parser)
        return parser

    @classmethod
    def defaults(cls):
        """The options that an empty command line gives, as a Namespace."""
        return cls.build_parser().parse_args([])

    @classmethod
    def answer_help(cls):
        """Print the help and exit, if the command line asks for it."""
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            if is_rank_0():
                cls.build_parser().print_help()
            sys.exit()

    def data_options(self):
        """The options that select the same data, as a command line."""
        names = ("data_path", "image_size", "image_channels")
        defaults = self.defaults()
        changed = [name for name in names if getattr(self, name) != getattr(defaults, name)]
        words = [word for name in ["dataset", *changed] for word in (f"--{option_name(name)}", str(vars(self)[name]))]
        return shlex.join([*words, *["--skip-bad-images"] * self.skip_bad_images])

    def as_dict(self):
        """The options that are saved with the run: all but those in `NOT_SAVED`."""
        return {name: value for name, value in vars(self).items() if name not in NOT_SAVED}

    def as_markdown(self):
        """The options as a Markdown table."""
        rows = [f"| {option_name(name)} | {value} |" for name, value in sorted(self.as_dict().items())]
        return "\n".join(["| option | value |", "|---|---|", *rows])


def option_name(name):
    return name.replace("_", "-")


def _is_possible(value):
    """Whether a command line could have this value: a string without NUL, in characters of the system."""
    try:
        return "\0" not in os.fsdecode(os.fsencode(str(value)))
    except ValueError:
        return False


def words_of(options):
    """The command-line words that set these options, so that the parser checks saved values like typed ones."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{option_name(name)}")
        elif value is not None and value is not False:
            words += [f"--{option_name(name)}={value}"]
    return words


def hyphenate(word):
    """Accept `--batch_size` for `--batch-size`: replace underscores in the option's name, not in its value."""
    option, equals, value = word.partition("=")
    return option_name(option) + equals + value if re.fullmatch(r"--\w[\w-]*", option) else word
