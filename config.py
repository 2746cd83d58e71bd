"""The options of both scripts, each with its default, in one place."""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

from models.choices import EXECUTIONS, PRIMITIVES, SEARCH_SPACES, STEMS
from running.data_sets import DATASETS
from running.errors import OneLineParser, UserError
from running.folder import RunFolder, launcher

MAX_NUMBER = 2**31 - 1  # that any option takes
MAY_CHANGE = ("epochs", "workers", "device", "print_freq", "data_path")  # when a run is resumed; the rest is the run's
NOT_SAVED = ("resume", "auto_resume", "overwrite", "gpus", "evaluate", "mirror")  # options of the command, not the run


def _number(kind, low, high=math.inf, low_open=False, high_open=False):
    """An argparse type: a number of this kind within bounds, which the complaint names."""
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
        if not inside or not number <= MAX_NUMBER:
            limit = f" and at most {MAX_NUMBER}" if number > MAX_NUMBER and high == math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {names[kind]} {bounds}{limit}, not {text!r}")
        return number

    return read


positive_int = _number(int, 1)
natural = _number(int, 0)
positive = _number(float, 0, low_open=True)
nonnegative = _number(float, 0)
probability = _number(float, 0, 1, high_open=True)  # 1 would leave nothing to divide by


def _folder_name(text):
    """An argparse type: the name of a folder, which --overwrite may delete, so no path to another place."""
    if text in ("", ".", "..") or Path(text).name != text or len(text.encode()) > 255:
        raise argparse.ArgumentTypeError(f"must be the name of a folder, without slashes, not {text[:50]!r}")
    return text


def _gpus(text):
    """An argparse type: `all`, or CUDA devices' numbers."""
    numbers = text.split(",")
    if text != "all" and (not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers)):
        raise argparse.ArgumentTypeError(f"must be all, or different numbers as in 0,1,2, not {text!r}")
    return text


def _primitives(text):
    """An argparse type: operations, with commas, or the name of a search space; returns the operations, with commas."""
    names = SEARCH_SPACES.get(text) or text.split(",")
    if not set(names) <= set(PRIMITIVES):
        from models.ops import OPS  # takes the seconds of `import torch`; holds operations that a user's script adds

        unknown = [name for name in names if name not in OPS]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown operation {unknown[0][:50]!r}; give some of {', '.join(OPS)}, with commas and no spaces, or "
                f"one of the search spaces {', '.join(SEARCH_SPACES)}"
            )
    if len(set(names)) < len(names) or names == ["none"]:
        raise argparse.ArgumentTypeError(f"must be different operations, at least one other than none, not {text!r}")
    return ",".join(names)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Config:
    """Options as attributes. `argv` is a list of words; None takes the command line."""

    stage = None  # the run's parent folder

    def __init__(self, argv=None):
        parser = self.build_parser()
        words = [_hyphenate(word) for word in (sys.argv[1:] if argv is None else argv)]
        self.set_defaults(parser, words)
        options = parser.parse_args(words)
        if options.resume is not None:
            options = self._resume(parser, words, options)
        if "genotype" in options and options.genotype is None and options.evaluate is None:
            parser.error("--genotype is required")
        if options.auto_resume and (options.resume or options.overwrite):
            parser.error("--auto-resume can't be given with --resume or --overwrite")
        vars(self).update(vars(options))
        if self._continues():
            self.resume, self.overwrite = str(self.folder()), False

    def _resume(self, parser, words, options):
        """The options of the run to be resumed, with those that may change as given on the command line."""
        folder = self._resumed_folder(options.resume)
        not_given = object()
        given = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(options), not_given)))
        given = {name: value for name, value in vars(given).items() if value is not not_given and name != "resume"}
        for name in given:
            if name not in (*MAY_CHANGE, "gpus"):
                allowed = ", ".join(f"--{_option(other)}" for other in MAY_CHANGE)
                raise UserError(f"--{_option(name)} is fixed by the run {folder}; --resume allows only {allowed}")
        try:
            saved = json.loads(folder.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"--resume {options.resume}: no {self.stage} run's {folder.config.name} in {folder}"
            ) from None
        if not isinstance(saved, dict):
            raise UserError(f"--resume {options.resume}: {folder.config} is not of a {self.stage} run")
        saved = self.completed(saved, folder.config)
        return parser.parse_args(_words(saved | given | {"resume": options.resume}))

    @classmethod
    def completed(cls, saved, source):
        """A run's saved options, with the defaults of options that the program did not have when it saved them.

        source: the file, for the message. Raises UserError where there are options that this program does not know.
        """
        parser = cls.build_parser()
        cls.set_defaults(parser, _words(saved))
        known = {action.dest for action in parser._actions}
        unknown = sorted(set(saved) - known)
        if unknown:
            raise UserError(
                f"{source} is not of a {cls.stage} run of this program: it has options that are not known here, "
                + ", ".join(unknown)
            )
        defaults = vars(parser.parse_args([]))
        return {name: value for name, value in defaults.items() if name not in NOT_SAVED} | saved

    def _continues(self):
        """Whether to resume a run because the same command is given once more: by --auto-resume or by torchrun."""
        folder = self.folder()
        if not folder.config.is_file():
            return False
        restarted = "TORCHELASTIC_RUN_ID" in os.environ and folder.launcher.is_file()
        return self.auto_resume or (restarted and folder.launcher.read_text() == launcher())

    @staticmethod
    def _resumed_folder(resume):
        return RunFolder(Path(resume).parent if Path(resume).is_file() else resume)

    @staticmethod
    def set_defaults(parser, words):
        """Change defaults that depend on other options."""

    def folder(self):
        """The `RunFolder` of the run."""
        if self.resume is not None:
            return self._resumed_folder(self.resume)
        return RunFolder(Path(self.runs_path) / self.stage / (self.name or self.dataset))

    @classmethod
    def build_parser(cls):
        parser = OneLineParser(
            description=cls.__doc__.splitlines()[0],
            formatter_class=_Help,
            allow_abbrev=False,
        )
        cls.add_options(parser)

        group = parser.add_argument_group("data")
        group.add_argument("--dataset", default="digits", choices=list(DATASETS), help="data set")
        group.add_argument(
            "--data-path", default="data", metavar="DIR", help="where data sets are, or are downloaded to"
        )
        group.add_argument(
            "--image-size",
            type=_number(int, 8),
            default=32,
            metavar="PIXELS",
            help="of the data set `folder`: images are scaled and cropped to this height and width",
        )
        group.add_argument(
            "--image-channels", type=int, default=3, choices=(1, 3), help="of the data set `folder`: 1 grey, 3 colour"
        )
        group.add_argument(
            "--skip-bad-images",
            action="store_true",
            help="of the data set `folder`: read all first, and leave out those that cannot be read",
        )
        group.add_argument(
            "--workers", type=natural, default=2, metavar="N", help="processes that load images, for each rank; 0: none"
        )

        group = parser.add_argument_group("run")
        group.add_argument(
            "--name", type=_folder_name, metavar="NAME", help="name of the run's folder (default: the data set)"
        )
        group.add_argument("--runs-path", default="runs", metavar="DIR", help=f"a run's folder is DIR/{cls.stage}/NAME")
        group.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds, if any")
        group.add_argument(
            "--resume",
            metavar="RUN",
            help="go on with the run in this folder (or from a checkpoint in it), with its options; "
            + ", ".join(f"--{_option(name)}" for name in MAY_CHANGE)
            + " may be given anew",
        )
        group.add_argument(
            "--auto-resume",
            action="store_true",
            help="go on with the run of this name if there is one, for commands that a scheduler repeats",
        )
        group.add_argument(
            "--checkpoint-minutes",
            type=nonnegative,
            default=10.0,
            metavar="MIN",
            help="save within an epoch too, this often; 0: after every step",
        )
        group.add_argument("--seed", type=natural, default=2, metavar="N", help="of everything that is random")
        group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
        group.add_argument(
            "--gpus",
            type=_gpus,
            metavar="LIST",
            help="run on several GPUs of this machine, a process each: 0,1,2 or all; torchrun does so over machines",
        )
        group.add_argument(
            "--sync-bn",
            action="store_true",
            help="on several ranks: normalise by the statistics of the global batch, not of each rank's part",
        )
        group.add_argument("--amp", action="store_true", help="mixed precision: bfloat16 where PyTorch deems it safe")
        group.add_argument("--print-freq", type=positive_int, default=50, metavar="N", help="steps between log lines")
        return parser

    @classmethod
    def answer_help(cls):
        """Print the help and exit, if the command line asks for it."""
        if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            if os.environ.get("RANK", "0") == "0":
                cls.build_parser().print_help()
            sys.exit()

    def data_options(self):
        """The command-line words that name the same data."""
        names = ("data_path", "image_size", "image_channels")
        defaults = self.build_parser()
        changed = [name for name in names if getattr(self, name) != defaults.get_default(name)]
        words = [word for name in ["dataset", *changed] for word in (f"--{_option(name)}", str(vars(self)[name]))]
        return shlex.join([*words, *["--skip-bad-images"] * self.skip_bad_images])

    def as_dict(self):
        """What makes the run what it is: all options but those in `NOT_SAVED`."""
        return {name: value for name, value in vars(self).items() if name not in NOT_SAVED}

    def as_markdown(self):
        """The options as a Markdown table."""
        rows = [f"| {_option(name)} | {value} |" for name, value in sorted(self.as_dict().items())]
        return "\n".join(["| option | value |", "|---|---|", *rows])


class SearchConfig(_Config):
    """Search for a cell: DARTS, first or second order."""

    stage = "search"

    @staticmethod
    def add_options(parser):
        group = parser.add_argument_group("network")
        group.add_argument("--layers", type=positive_int, default=8, metavar="N", help="cells")
        group.add_argument("--init-channels", type=positive_int, default=16, metavar="C", help="of the first cells")
        group.add_argument("--nodes", type=positive_int, default=4, metavar="N", help="nodes of a cell")
        group.add_argument(
            "--primitives",
            type=_primitives,
            default="darts",
            metavar="OPS",
            help="candidates on every edge: operations as skip_connect,sep_conv_3x3, or a search space of "
            + ", ".join(SEARCH_SPACES),
        )
        _add_execution(group)
        group.add_argument(
            "--recompute",
            action="store_true",
            help="compute what a cell has inside again for the backward pass, to need less memory",
        )

        group = parser.add_argument_group("search")
        group.add_argument("--epochs", type=positive_int, default=50, metavar="N", help="epochs")
        group.add_argument(
            "--batch-size", type=positive_int, default=64, metavar="N", help="images a step and half, over all ranks"
        )
        group.add_argument(
            "--order", default="second", choices=("first", "second"), help="of the alphas' gradient: eq. 6, or xi = 0"
        )
        group.add_argument("--w-lr", type=positive, default=0.025, metavar="LR", help="weights: learning rate")
        group.add_argument(
            "--w-lr-min", type=nonnegative, default=0.001, metavar="LR", help="weights: after the cosine"
        )
        group.add_argument("--w-momentum", type=probability, default=0.9, metavar="M", help="weights: SGD's momentum")
        group.add_argument("--w-weight-decay", type=nonnegative, default=3e-4, metavar="D", help="weights: decay")
        group.add_argument("--w-grad-clip", type=positive, default=5.0, metavar="NORM", help="weights: gradient norm")
        group.add_argument("--alpha-lr", type=positive, default=3e-4, metavar="LR", help="alphas: Adam's learning rate")
        group.add_argument("--alpha-weight-decay", type=nonnegative, default=1e-3, metavar="D", help="alphas: decay")


# Liu et al., section 4.3 and the appendix on ImageNet
IMAGENET = {
    "layers": 14,
    "init_channels": 48,
    "epochs": 250,
    "batch_size": 128,
    "lr": 0.1,
    "lr_decay": 0.97,
    "weight_decay": 3e-5,
    "label_smoothing": 0.1,
    "drop_path_prob": 0.0,
    "cutout_length": 0,
    "image_size": 224,
}


class AugmentConfig(_Config):
    """Train the network that a genotype makes, from scratch."""

    stage = "augment"

    @staticmethod
    def set_defaults(parser, words):
        stem = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        stem.add_argument("--stem", nargs="?")
        if stem.parse_known_args(words)[0].stem == "imagenet":
            parser.set_defaults(**IMAGENET)

    @staticmethod
    def add_options(parser):
        group = parser.add_argument_group("network")
        group.add_argument(
            "--genotype",
            metavar="G",
            help="a published cell as DARTS_V2, a string 'Genotype(...)', JSON, a file of these, or a search's folder",
        )
        group.add_argument(
            "--stem",
            default="cifar",
            choices=STEMS,
            help="imagenet: for images of 64 pixels and up, with the paper's settings for ImageNet as the defaults",
        )
        group.add_argument("--layers", type=positive_int, default=20, metavar="N", help="cells")
        group.add_argument("--init-channels", type=positive_int, default=36, metavar="C", help="of the first cells")
        _add_execution(group)

        group = parser.add_argument_group("evaluation, without training")
        group.add_argument(
            "--evaluate",
            metavar="CKPT",
            help="print the test accuracy, overall and by class, of this checkpoint, or of a run's best; of the other "
            "options --data-path, --batch-size, --workers and --device count",
        )
        group.add_argument("--mirror", action="store_true", help="average over each image and its mirror image")

        group = parser.add_argument_group("training")
        group.add_argument(
            "--init-checkpoint",
            metavar="CKPT",
            help="start from the weights of this checkpoint, or of a run's best, of the same genotype and size; with "
            "other classes the classifiers start anew",
        )
        group.add_argument("--epochs", type=positive_int, default=600, metavar="N", help="epochs")
        group.add_argument(
            "--batch-size", type=positive_int, default=96, metavar="N", help="images a step, over all ranks"
        )
        group.add_argument("--lr", type=positive, default=0.025, metavar="LR", help="learning rate at the start")
        group.add_argument(
            "--lr-decay",
            type=_number(float, 0, 1, low_open=True),
            metavar="FACTOR",
            help="of the learning rate after each epoch; without it, along a cosine to zero",
        )
        group.add_argument(
            "--label-smoothing", type=probability, default=0.0, metavar="P", help="spread evenly over all classes"
        )
        group.add_argument("--momentum", type=probability, default=0.9, metavar="M", help="SGD's momentum")
        group.add_argument("--weight-decay", type=nonnegative, default=3e-4, metavar="D", help="decay")
        group.add_argument("--grad-clip", type=positive, default=5.0, metavar="NORM", help="gradient norm")
        group.add_argument(
            "--aux-weight", type=nonnegative, default=0.4, metavar="W", help="auxiliary loss; 0: no head"
        )
        group.add_argument(
            "--cutout-length",
            type=natural,
            default=16,
            metavar="PIXELS",
            help="side of the square cut out; at most half the image's",
        )
        group.add_argument("--drop-path-prob", type=probability, default=0.2, metavar="P", help="at the last epoch")


def _add_execution(group):
    group.add_argument(
        "--execution",
        default="fused",
        choices=EXECUTIONS,
        help="of the cells: fast, or an operation at a time, which is the definition",
    )


def _option(name):
    return name.replace("_", "-")


def _words(options):
    """A command line that sets these options, so that values from a file pass the same checks as typed ones."""
    words = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{_option(name)}")
        elif value is not None and value is not False:
            words += [f"--{_option(name)}={value}"]
    return words


def _hyphenate(word):
    """`--batch_size` is `--batch-size`; values are left alone."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return "--" + _option(option[2:]) + equals + value
