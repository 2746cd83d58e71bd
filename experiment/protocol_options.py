"""The options of protocol.py, and among them those of search.py and augment.py in quotes."""

import argparse
import shlex

from command_line.errors import OneLineParser, UserError, shown
from config import AugmentConfig, SearchConfig, add_data
from experiment.members import CHANCE, is_label
from genotypes import PUBLISHED
from run.options import (
    HelpWithDefaults,
    folder_name,
    gpus,
    hyphenate,
    natural,
    number,
    option_name,
    positive_int,
    words_of,
)

up_to_1000 = number(int, 0, 1000)

SET_HERE = ("name", "runs_path", "overwrite", "resume", "auto_resume", "seed", "gpus")  # of each run
SET_HERE_TO_AUGMENT = (*SET_HERE, "genotype", "hold_out", "evaluate", "mirror", "init_checkpoint")


def read_options(argv):
    """The options, with these in addition: `shared`, words for both scripts, and `search` and `augment` as words."""
    parser = build_parser()
    options = parser.parse_args(list(joined(map(hyphenate, argv))))
    if options.gpus and options.device != "auto":
        parser.error("--gpus chooses the devices; leave --device out")
    if not options.searches + options.random + len(options.cells):
        parser.error("there is nothing to run: give some of --searches, --random and --cells")
    if len(set(options.cells)) < len(options.cells):
        parser.error("--cells must be different cells")
    data = argparse.ArgumentParser()
    add_data(data)
    shared = {action.dest: getattr(options, action.dest) for action in data._actions if action.dest != "help"}
    options.shared = words_of(shared | {"device": options.device})
    options.search = quoted(SearchConfig, options.search, SET_HERE, [*shared, "device"], "--search")
    options.augment = quoted(AugmentConfig, options.augment, SET_HERE_TO_AUGMENT, [*shared, "device"], "--augment")
    options.command = shlex.join(["python", "protocol.py", *without_place(joined(argv))])
    options.label = options.label or options.name or options.dataset
    if not is_label(options.label):
        parser.error(
            f"--label {shown(options.label)}: must be one line without |, and none of {CHANCE}, {', '.join(PUBLISHED)}"
        )
    return options


def build_parser():
    parser = OneLineParser(
        description="Search, select, train in full, and compare with chance and published cells.",
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("members")
    group.add_argument("--searches", type=up_to_1000, default=4, metavar="N", help="searches, of seeds S+1 to S+N")
    group.add_argument(
        "--random", type=up_to_1000, default=4, metavar="N", help="random cells of the searches' space, same seeds"
    )
    group.add_argument("--like", metavar="GENOTYPE", help="of random cells: as many parameters as this cell, to 5 %%")
    group.add_argument("--cells", nargs="*", default=[], choices=PUBLISHED, metavar="CELL", help="published cells")
    group.add_argument("--seed", type=natural, default=0, metavar="S", help="the seeds are S+1, S+2, ...")

    group = parser.add_argument_group("stages")
    group.add_argument("--search", default="", metavar='"OPTIONS"', help='options of search.py, as "--order first"')
    group.add_argument("--augment", default="", metavar='"OPTIONS"', help='options of augment.py, as "--layers 8"')
    group.add_argument("--select-epochs", type=positive_int, default=100, metavar="N", help="of a selection training")
    group.add_argument(
        "--hold-out",
        type=number(float, 0, 1, low_open=True, high_open=True),
        default=0.1,
        metavar="F",
        help="fraction of the training images whose accuracy selects",
    )
    group.add_argument(
        "--final-seeds", type=up_to_1000, default=1, metavar="N", help="final trainings of a cell, of seeds S+1 to S+N"
    )
    group.add_argument(
        "--finals",
        default="best",
        choices=("best", "all"),
        help="cells trained in full: the best search, the best random and each published cell; or all",
    )

    add_data(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--name", type=folder_name, metavar="NAME", help="of the folder (default: the data set)")
    group.add_argument("--runs-path", default="runs", metavar="DIR", help="the folder is DIR/protocol/NAME")
    group.add_argument("--label", metavar="TEXT", help="of the searches in tables (default: the name)")
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    group.add_argument("--gpus", type=gpus, metavar="LIST", help="a run at a time on each of these GPUs: 0,1,2 or all")
    group.add_argument(
        "--member",
        type=positive_int,
        metavar="I",
        help="only part I, for job arrays: a member's search and selection training, or a final training",
    )
    return parser


def joined(words):
    """The words with `--search X` as `--search=X`, since argparse takes an X that begins with `-` for an option."""
    words = iter(words)
    for word in words:
        value = next(words, None) if word in ("--search", "--augment") else None
        yield word if value is None else f"{word}={value}"


def without_place(words):
    """The words without --member and --gpus, which say where parts run and not what they are."""
    words = iter(words)
    for word in words:
        name = word.partition("=")[0]
        if name not in ("--member", "--gpus"):
            yield word
        elif name == word:
            next(words)


def quoted(config, text, set_here, shared, option):
    """The words in an option's value, in the form that is saved. Raises UserError for what doesn't belong there."""
    try:
        words = list(map(hyphenate, shlex.split(text)))
    except ValueError as error:
        raise UserError(f"{option}: {error}: {text}") from None
    parser = config.build_parser()
    parser.prog += f" {option}"
    unset = object()
    names = {action.dest for action in parser._actions}
    parsed = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(names, unset))))
    for name in (name for name, value in parsed.items() if value is not unset):
        if name in shared:
            raise UserError(f"{option}: --{option_name(name)} is given once, to protocol.py itself")
        if name in set_here:
            raise UserError(f"{option}: --{option_name(name)} is set by protocol.py, for each run")
    config([*words, *["--genotype", "DARTS_V2"] * (config is AugmentConfig)])  # in full: options that contradict
    return words
