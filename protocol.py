"""The whole experiment of DARTS (arXiv:1806.09055, section 3), beside random and published cells: docs/protocol.md.

python protocol.py --dataset cifar10 --searches 4 --random 4 --cells DARTS_V2            # the paper's, with chance
python protocol.py --dataset cifar10 --name first --search "--order first"               # options of search.py
python protocol.py --searches 2 --random 2 --select-epochs 2 --search "--epochs 2" \\
    --augment "--layers 3 --init-channels 4 --epochs 3"                                  # small, on embedded data
python protocol.py --dataset cifar10 --gpus all                                          # a run on each GPU at a time
python protocol.py --dataset cifar10 --member 3                                          # one part, for job arrays

Searches with different seeds; a short training of each found cell, whose accuracy on held-out training images selects
the best; training of this one in full, and its accuracy on the test images. Each random and published cell is trained
under the same conditions. The same command goes on after an interruption, and starts nothing that is over.
"""

import argparse
import os
import shlex
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

from config import AugmentConfig, SearchConfig, add_data
from genotypes import PUBLISHED, GenotypeError
from running.children import Child, ForwardedSignals
from running.errors import OneLineParser, UserError, user_errors_in_one_line
from running.folder import write_json
from running.members import Plan, read_json, results_of
from running.options import (
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
from running.version import program_version

SET_HERE = ("name", "runs_path", "overwrite", "resume", "auto_resume", "seed", "gpus")  # of each run
SET_HERE_TO_AUGMENT = (*SET_HERE, "genotype", "hold_out", "evaluate", "mirror", "init_checkpoint")
MAY_CHANGE = ("device", "workers", "data_path", "label")  # of an interrupted protocol; all other options are fixed
NOT_SAVED = ("member", "gpus", "runs_path", "name")
POLL_SECONDS = 0.2
STATUS_SECONDS = 60  # between lines of progress


def main():
    with user_errors_in_one_line("protocol.py"):
        options = read_options(sys.argv[1:])
        plan = Plan(options, Path(options.runs_path) / "protocol" / (options.name or options.dataset))
        open_folder(plan)
        failed, stopped_by = run(plan)
        results, complete = write_results(plan), not any(True for _ in unfinished(plan, options.member, ()))
        if options.member is None and not stopped_by:
            from report.comparison import write  # here, since it imports matplotlib, which takes a second

            write([results], plan.folder / "report.html")
            print(plan.folder / "report.html")
    for name, reason in failed.items():
        print(f"protocol.py: {name} failed: {reason}", file=sys.stderr)
    sys.exit(128 + stopped_by if stopped_by else int(bool(failed) or not complete))


# Options


def read_options(argv):
    """The options, with these in addition: `shared`, words for both scripts, and `search` and `augment` as words."""
    parser = OneLineParser(
        description="Search, select, train in full, and compare with chance and published cells.",
        formatter_class=HelpWithDefaults,
        allow_abbrev=False,
    )
    add_options(parser)
    options = parser.parse_args(list(joined(map(hyphenate, argv))))
    if options.gpus and options.device != "auto":
        parser.error("--gpus chooses the devices; leave --device out")
    if len(set(options.cells)) < len(options.cells):
        parser.error("--cells must be different cells")
    data = argparse.ArgumentParser()
    add_data(data)
    shared = {action.dest: getattr(options, action.dest) for action in data._actions if action.dest != "help"}
    options.shared = words_of(shared | {"device": options.device})
    options.search = quoted(SearchConfig, options.search, SET_HERE, [*shared, "device"], "--search")
    options.augment = quoted(AugmentConfig, options.augment, SET_HERE_TO_AUGMENT, [*shared, "device"], "--augment")
    options.label = options.label or options.name or options.dataset
    return options


def add_options(parser):
    group = parser.add_argument_group("members")
    group.add_argument("--searches", type=natural, default=4, metavar="N", help="searches, of seeds S+1 to S+N")
    group.add_argument("--random", type=natural, default=4, metavar="N", help="random cells, random:SEED of S+1 to S+N")
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
        "--final-seeds", type=natural, default=1, metavar="N", help="final trainings of a cell, of seeds S+1 to S+N"
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
        help="only part I: a member's search and selection training, or a final training; without it the parts are listed",
    )


def joined(words):
    """The words with `--search X` as `--search=X`, since argparse takes an X that begins with `-` for an option."""
    words = iter(words)
    for word in words:
        value = next(words, None) if word in ("--search", "--augment") else None
        yield word if value is None else f"{word}={value}"


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


# The folder


def open_folder(plan):
    """Create the folder, or check that it is of a protocol with the same options."""
    saved = {name: value for name, value in vars(plan.options).items() if name not in (*NOT_SAVED, "shared")}
    path = plan.folder / "config.json"
    before = read_json(path)
    if before is None and plan.folder.exists() and any(not one.name.endswith(".tmp") for one in plan.folder.iterdir()):
        raise UserError(f"{plan.folder} holds files that are no protocol's; choose another --name")
    for name, value in (before or {}).items():
        if name in saved and name not in MAY_CHANGE and saved[name] != value:
            old, new = (" ".join(map(str, one)) if isinstance(one, list) else one for one in (value, saved[name]))
            raise UserError(
                f"{plan.folder} is of a protocol with --{option_name(name)} {old!r}, not {new!r}; choose another --name"
            )
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_shared(path, saved)


def write_shared(path, content):
    """`write_json` where several processes, as of a job array, write the same file."""
    own = path.with_name(f"{uuid.uuid4().hex}.tmp")
    write_json(own, content)
    os.replace(own, path)


def write_results(plan):
    results = results_of(plan, shlex.join(["python", "protocol.py", *sys.argv[1:]]), program_version())
    write_shared(plan.folder / "results.json", results)
    return results


# The runs


def unfinished(plan, part, failed):
    """The runs that may start now, in order. part: the number of the only part that counts, or None."""
    tasks = plan.tasks(failed)
    return (t for t in tasks if part in (None, t.part) and t.name not in failed and t.summary() is None)


def run(plan):
    """Run what is not over. Returns (failed: name -> reason, the signal that stopped it or None)."""
    part, failed, free = plan.options.member, {}, slots(plan.options.gpus)
    n_slots, shown = len(free), time.monotonic()
    say(status(plan, [], n_slots))
    with ForwardedSignals() as signals:
        running = signals.children
        while True:
            waiting = [] if signals.received else list(unfinished(plan, part, failed))
            for task in waiting:
                if free and task.name not in [child.task.name for child in running]:
                    running.append(Child(task, free.pop(0), n_slots))
                    say(f"{task.name} starts; its log is {task.folder.log}")
            if not running:
                return failed, signals.received
            while not any(child.is_over() for child in running):
                time.sleep(POLL_SECONDS)
                if time.monotonic() - shown > STATUS_SECONDS:
                    shown = time.monotonic()
                    say(status(plan, running, n_slots))
            for child in [child for child in running if child.is_over()]:
                running.remove(child)
                free.append(child.gpu)
                if child.error() is None and child.task.summary():
                    say(f"{child.task.name} is over; {status(plan, running, n_slots)}")
                elif not signals.received:
                    failed[child.task.name] = child.error() or "it wrote no summary.json"
                    say(f"{child.task.name} failed: {failed[child.task.name]}; the rest goes on")
                write_results(plan)


def slots(gpus):
    """Where runs may be at the same time: entries of CUDA_VISIBLE_DEVICES; without --gpus one place, None."""
    if not gpus:
        return [None]
    from running.ranks import visible_gpus  # here, since it imports torch

    return visible_gpus(gpus)


def status(plan, running, n_slots):
    """What is left, and how long it will take, in a line."""
    left, seconds, unknown = [], 0.0, False
    tasks = plan.tasks([])
    for kind in ("search", "selection", "final"):
        of_kind = [task for task in tasks if task.kind == kind]
        over = [task for task in of_kind if task.summary()]
        n_left = plan.count_of(kind) - len(over)
        if n_left:
            left.append(f"{n_left} of {plan.count_of(kind)} {kind} runs")
            epochs = plan.epochs_of(kind) - sum(t.summary()["epochs"] for t in over)
            epochs -= sum(task.epochs_done() for task in of_kind if task not in over)
            rate = seconds_per_epoch(plan, kind, over, running)
            unknown |= rate is None
            seconds += epochs * (rate or 0.0)
    if not left:
        return "nothing is left"
    about = (
        "how long is known after the first epochs"
        if unknown
        else f"about {timedelta(seconds=round(seconds / n_slots))}"
    )
    return f"left: {', '.join(left)}; {about}"


def seconds_per_epoch(plan, kind, over, running):
    """Of a kind of run: measured on those that are over, else on those that are running; None where nothing is."""
    rates = [task.summary()["seconds"] / task.summary()["epochs"] for task in over]
    rates = rates or [rate for child in running if child.task.kind == kind and (rate := child.seconds_per_epoch())]
    if rates:
        return sum(rates) / len(rates)
    if kind == "final":  # on all training images
        selections = [task for task in plan.tasks([]) if task.kind == "selection" and task.summary()]
        rate = seconds_per_epoch(plan, "selection", selections, running)
        return rate and rate / (1 - plan.options.hold_out)
    return None


def say(line):
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
