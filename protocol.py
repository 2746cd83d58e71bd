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

import os
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

from command_line.errors import UserError, user_errors_in_one_line
from experiment.children import Child, ForwardedSignals
from experiment.members import Plan, results_of
from experiment.protocol_options import read_options
from run.folder import RunFolder, read_json, write_json
from run.options import option_name
from run.version import program_version

MAY_CHANGE = ("device", "workers", "data_path", "label")  # of an interrupted protocol; all other options are fixed
NOT_SAVED = ("member", "gpus", "runs_path", "name", "command", "shared")
POLL_SECONDS = 0.2
STATUS_SECONDS = 60  # between lines of progress


def main():
    with user_errors_in_one_line("protocol.py"):
        options = read_options(sys.argv[1:])
        plan = Plan(options, Path(options.runs_path) / "protocol" / (options.name or options.dataset))
        places = slots(options.gpus)
        open_folder(plan)
        if options.member is not None:
            plan.check_part(options.member)
        failed, stopped_by = run(plan, places)
        results = write_results(plan)
        if stopped_by:
            say(f"{stopped_by.name}: stopped; the same command goes on")
            sys.exit(128 + stopped_by)
        if options.member is None:
            from report.comparison import write  # here, since it imports torch and matplotlib

            write([results], plan.folder / "report.html")
            say(f"results: {plan.folder / 'results.json'} and {plan.folder / 'report.html'}")
        if failed:
            causes = "; ".join(f"{name} failed: {cause}" for name, cause in failed.items())
            raise UserError(f"{causes}; the same command tries again")


# The folder


def open_folder(plan):
    """Create the folder, or check that it is of a protocol with the same options."""
    saved = {name: value for name, value in vars(plan.options).items() if name not in NOT_SAVED}
    path = plan.folder / "config.json"
    RunFolder(plan.folder).check()
    plan.folder.mkdir(parents=True, exist_ok=True)
    others = [one for one in plan.folder.iterdir() if one.suffix != ".tmp"]  # listed first, since others may start too
    before = read_json(path)
    if others and not isinstance(before, dict):
        raise UserError(f"{plan.folder} holds files that are no protocol's; choose another --name")
    for name, value in (before or {}).items():
        if name in saved and name not in MAY_CHANGE and saved[name] != value:
            old, new = (" ".join(map(str, one)) if isinstance(one, list) else one for one in (value, saved[name]))
            raise UserError(
                f"{plan.folder} is of a protocol with --{option_name(name)} {old!r}, not {new!r}; choose another --name"
            )
    write_shared(path, saved)


def write_shared(path, content):
    """`write_json` where several processes, as of a job array, write the same file."""
    own = path.with_name(f"{uuid.uuid4().hex}.tmp")
    write_json(own, content)
    os.replace(own, path)


def write_results(plan):
    results = results_of(plan, program_version())
    write_shared(plan.folder / "results.json", results)
    return results


# The runs


def unfinished(plan, part, failed):
    """The runs that may start now, in order. part: the number of the only part that counts, or None."""
    tasks = plan.tasks(failed)
    return (t for t in tasks if part in (None, t.part) and t.name not in failed and plan.summary(t) is None)


def run(plan, free):
    """Run what is not over. free: of `slots`. Returns (failed: name -> reason, the signal that stopped it or None)."""
    part, failed = plan.options.member, {}
    n_slots, shown = len(free), time.monotonic()
    say(plan.parts())
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
            if signals.received:  # while a child was being started
                signals.stop_children()
            while not any(child.is_over() for child in running):
                time.sleep(POLL_SECONDS)
                if time.monotonic() - shown > STATUS_SECONDS:
                    shown = time.monotonic()
                    say(status(plan, running, n_slots))
            for child in [child for child in running if child.is_over()]:
                running.remove(child)
                free.append(child.gpu)
                if child.error() is None and plan.summary(child.task):
                    say(f"{child.task.name} is over; {status(plan, running, n_slots)}")
                elif not signals.received:
                    failed[child.task.name] = child.error() or "it wrote no summary.json"
                    say(f"{child.task.name} failed: {failed[child.task.name]}; the rest goes on")
                write_results(plan)


def slots(gpus):
    """Where runs may be at the same time: entries of CUDA_VISIBLE_DEVICES; without --gpus one place, None."""
    if not gpus:
        return [None]
    from machine.ranks import visible_gpus  # here, since it imports torch

    return visible_gpus(gpus)


def status(plan, running, n_slots):
    """What is left, and how long it will take, in a line."""
    left, seconds, unknown = [], 0.0, []
    tasks = plan.tasks([])
    for kind in ("search", "selection", "final"):
        of_kind = [task for task in tasks if task.kind == kind]
        over = [task for task in of_kind if plan.summary(task)]
        n_left = plan.count_of(kind) - len(over)
        if n_left:
            left.append(f"{n_left} of {plan.count_of(kind)} {kind} runs")
            epochs = n_left * plan.epochs_of(kind) - sum(task.epochs_done() for task in of_kind if task not in over)
            rate = seconds_per_epoch(plan, kind, over, running)
            unknown += [kind] if rate is None else []
            seconds += epochs * (rate or 0.0)
    if not left:
        return "nothing is left"
    times = [f"about {timedelta(seconds=round(seconds / n_slots))}"] if seconds else []
    times += [f"no time is known yet of {' and '.join(unknown)} runs"] if unknown else []
    return f"left: {', '.join(left)}; {', '.join(times)}"


def seconds_per_epoch(plan, kind, over, running):
    """Of a kind of run: measured on those that are over, else on those that are running; None where nothing is."""
    rates = [plan.summary(task)["seconds"] / plan.summary(task)["epochs"] for task in over]
    rates = rates or [rate for child in running if child.task.kind == kind and (rate := child.seconds_per_epoch())]
    if rates:
        return sum(rates) / len(rates)
    if kind == "final":  # on all training images
        selections = [task for task in plan.tasks([]) if task.kind == "selection" and plan.summary(task)]
        rate = seconds_per_epoch(plan, "selection", selections, running)
        return rate and rate / (1 - plan.options.hold_out)
    return None


def say(line):
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
