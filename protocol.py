"""The whole experiment of DARTS (arXiv:1806.09055, section 3), with random and published cells: docs/protocol.md.

python protocol.py --dataset cifar10 --searches 4 --random 4 --cells DARTS_V2            # the paper's, and random cells
python protocol.py --dataset cifar10 --name first --search "--order first"               # options of search.py
python protocol.py --searches 2 --random 2 --select-epochs 2 --search "--epochs 2" \\
    --augment "--layers 3 --init-channels 4 --epochs 3"                                  # small, on embedded data
python protocol.py --dataset cifar10 --gpus all                                          # one run at a time on each GPU
python protocol.py --dataset cifar10 --member 3                                          # one job of a job array

Searches with different seeds are run. Each cell that they give is trained for a short time, and the accuracy on
held-out training images selects the best one. This one is trained in full, and its accuracy on the test images is
measured. Random and published cells are trained under the same conditions. After an interruption the same command
goes on with what is left.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from command_line.errors import UserError, user_errors_in_one_line
from experiment.members import Plan, Task, check_options
from experiment.protocol_options import read_options
from experiment.results import results_of
from run.folder import read_json, reading, write_json
from run.version import program_version

MAY_CHANGE = ("device", "workers", "data_path", "label")  # when a protocol goes on; all other options are fixed
NOT_SAVED = ("member", "gpus", "runs_path", "name", "command", "shared")
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # Linux: choose the signal that a process receives when its parent ends


def main():
    with user_errors_in_one_line("protocol.py"):
        options = read_options(sys.argv[1:])
        plan = Plan(options, Path(options.runs_path) / "protocol" / (options.name or options.dataset))
        gpus = [None]
        if options.gpus:
            from machine.ranks import visible_gpus  # here, since it imports torch, which takes seconds

            gpus = visible_gpus(options.gpus)
        open_folder(plan)
        say(plan.job_numbers())
        write_results(plan)
        if options.member is not None:
            plan.check_job(options.member)
        stop_signals: list[signal.Signals] = []
        failures = asyncio.run(run(plan, gpus, stop_signals))
        if stop_signals:
            say(f"{stop_signals[0].name}: stopped; run the same command to go on")
            sys.exit(128 + stop_signals[0])
        if options.member is None:
            from report.comparison import write

            write([results_of(plan, program_version())], plan.folder / "report.html")
            say(f"results: {plan.folder / 'results.json'} and {plan.folder / 'report.html'}")
        if failures:
            raise UserError(f"{', '.join(failures)} failed; run the same command to try again")


def open_folder(plan: Plan) -> None:
    """Create the folder and write config.json. Raises UserError if it has a protocol with other options."""
    options = {name: value for name, value in vars(plan.options).items() if name not in NOT_SAVED}
    plan.folder.mkdir(parents=True, exist_ok=True)
    check_options(plan.folder, read_json(plan.folder / "config.json") or {}, options, MAY_CHANGE)
    write_shared(plan.folder / "config.json", options)


def write_results(plan: Plan) -> None:
    """Write results.json, and say how many runs are over."""
    with reading(plan.folder):
        results = results_of(plan, program_version())
    write_shared(plan.folder / "results.json", results)
    jobs = plan.jobs()
    n_over = sum(plan.summary(task) is not None for job in jobs for task in job)
    n_runs = plan.options.searches + (0 if plan.truth_known else len(jobs))
    say(f"{n_over} of {n_runs} runs are over")


def write_shared(path: Path, content: dict) -> None:
    """Write a JSON file atomically, although several processes, such as those of a job array, write it at once."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    write_json(temporary, content)
    os.replace(temporary, path)


async def run(plan: Plan, gpus: list[str | None], stop_signals: list[signal.Signals]) -> list[str]:
    """Start the remaining runs, one at a time on each GPU; return the names of those that failed.

    gpus: entries of CUDA_VISIBLE_DEVICES, or [None] for one run at a time on any device; stop_signals: signals that
    are received are added to this list, and then no run starts any more, and those that are running save and end.
    """
    failures: list[str] = []
    if os.name == "posix":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            asyncio.get_running_loop().add_signal_handler(number, stop_signals.append, signal.Signals(number))

    async def run_jobs(jobs: Iterator[int], gpu: str | None) -> None:
        """Run jobs on this GPU until none is left. Others take jobs from the same iterator."""
        for job in jobs:
            while not stop_signals and (task := plan.next_task(job)) and task.name not in failures:
                say(f"{task.name} starts; its log is {task.config.folder().log}")
                code = await run_child(task, gpu, len(gpus), stop_signals)
                if plan.summary(task):
                    say(f"{task.name} is over")
                elif not stop_signals:
                    say(f"{task.name} failed with exit code {code}; the rest goes on")
                    failures.append(task.name)
                write_results(plan)

    jobs = [plan.options.member] if plan.options.member else range(1, len(plan.jobs()) + 1)
    for are_final in (False, True):
        waiting = iter([job for job in jobs if (job > len(plan.members)) == are_final])
        await asyncio.gather(*(run_jobs(waiting, gpu) for gpu in gpus))
    return failures


async def run_child(task: Task, gpu: str | None, n_gpus: int, stop_signals: list[signal.Signals]) -> int:
    """Run a task in a process of its own, and return its exit code. Its errors are printed by this process.

    n_gpus: how many runs share the CPU cores; stop_signals: when there is one, the run is asked to save and to end.
    """
    environment = dict(os.environ)
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_gpus)))
    process = subprocess.Popen(
        task.command(),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # the run writes a log
        preexec_fn=end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 -- a single system call
    )
    while process.poll() is None and not stop_signals:
        await asyncio.sleep(POLL_SECONDS)
    process.terminate()  # if it still runs; Ctrl-C has sent SIGINT to the child too, and a second would kill it unsaved
    while process.poll() is None:
        await asyncio.sleep(POLL_SECONDS)
    return process.returncode


def end_with_parent() -> None:
    """Kill this process when its parent ends. Otherwise the protocol, started again, would run the task twice."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def say(line: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
