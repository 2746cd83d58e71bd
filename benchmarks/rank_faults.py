"""Kills one of several ranks at random instants, under torchrun --max-restarts, and compares with a run left alone.

    python benchmarks/rank_faults.py --runs 20 --ranks 3
    python benchmarks/rank_faults.py --runs 20 --stage augment

Small networks on the digits, on CPUs, saved after every step. One rank, chosen by chance, is killed with SIGKILL, four
times in five while the run takes its steps, else while it starts; torchrun then ends the others and starts all again.
Exit code 1 if a run differs from the one left alone, bit by bit.
"""

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comparing import differences, outcome

from benchmarks.faults import STAGES


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="search", choices=STAGES, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and the ranks")
    args = parser.parse_args()
    chance, same, seconds_down = random.Random(args.seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        torchrun, started = start(args, folder, "alone"), time.monotonic()
        wait_for_checkpoint(args, folder, "alone", torchrun)
        starting = time.monotonic() - started
        if torchrun.wait() != 0:
            sys.exit(Path(folder, "alone.txt").read_text())
        running = time.monotonic() - started - starting
        reference = outcome(Path(folder, "runs", args.stage, "alone"))
        for run in range(1, args.runs + 1):
            torchrun = start(args, folder, "killed")
            phase, seconds = ("running", running) if chance.random() < 0.8 else ("starting", starting)
            if phase == "running":
                wait_for_checkpoint(args, folder, "killed", torchrun)
            when = chance.uniform(0, seconds)
            killed, down = kill_a_rank(torchrun, args.ranks, when, chance)
            ended = torchrun.wait()
            output = Path(folder, "killed.txt").read_text()
            found = (
                differences(reference, outcome(Path(folder, "runs", args.stage, "killed"))) if ended == 0 else output
            )
            same += not found
            seconds_down += [down] * (down is not None)
            how = "it had ended" if killed is None else f"rank {killed} killed, the others gone {down:.1f} s later"
            resumed = re.findall(r"resumed after [^,\n]*|all \d+ epochs are done", output)
            went_on = " ".join(resumed) or "from the start"
            print(
                f"run {run}: at {when:.1f} of {seconds:.1f} s of {phase} {how}; {went_on}: {found or 'identical'}",
                flush=True,
            )
            shutil.rmtree(Path(folder, "runs", args.stage, "killed"))
    print(
        f"{args.stage}: {same} of {args.runs} runs identical to the one left alone, {len(seconds_down)} kills; the "
        f"others gone after {statistics.median(seconds_down):.1f} s, at most {max(seconds_down):.1f} s"
    )
    sys.exit(same < args.runs)


def start(args, folder, name):
    """torchrun with a stage's script on several ranks, its output in a file."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.ranks),
        "--max-restarts",
        "3",
        str(ROOT / f"{args.stage}.py"),
        *STAGES[args.stage],
        "--epochs",
        "6",
        "--name",
        name,
    ]
    with open(Path(folder, f"{name}.txt"), "w", encoding="utf-8") as output:
        return subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def wait_for_checkpoint(args, folder, name, torchrun):
    """Until a run has saved its start."""
    while not Path(folder, "runs", args.stage, name, "checkpoint.pt").exists() and torchrun.poll() is None:
        time.sleep(0.02)


def kill_a_rank(torchrun, ranks, when, chance):
    """Kill one of torchrun's processes this many seconds from now, or as soon as all are there.

    Returns the place of the one killed among them, and the seconds until none of them was left; None if it had ended.
    """
    time.sleep(when)
    while len(processes := children(torchrun.pid)) < ranks:
        if torchrun.poll() is not None:
            return None, None
        time.sleep(0.02)
    place = chance.randrange(ranks)
    os.kill(processes[place], signal.SIGKILL)
    killed = time.monotonic()
    while set(processes) & set(children(torchrun.pid)):
        time.sleep(0.02)
    return place, time.monotonic() - killed


def children(process):
    """The numbers of the processes that a process has started."""
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


if __name__ == "__main__":
    main()
