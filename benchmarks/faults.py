"""Kills runs at random instants, resumes them until they are done, and compares them bit by bit with runs left alone.

    python benchmarks/faults.py --minutes 30                  # both stages in turn
    python benchmarks/faults.py --stages search --runs 50

Small networks on the digits, saved after every step, so that many kills fall into a checkpoint being written. Every run
is killed with SIGKILL at least --kills times. Exit code 1 if a run differs.
"""

import argparse
import math
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comparing import differences, outcome

import augment  # noqa: F401 - so that no process has to load them
import search  # noqa: F401
from run.checkpoints import load_checkpoint

SMALL = "--layers 3 --init-channels 2 --batch-size 256 --epochs 2 --workers 0 --checkpoint-minutes 0 --print-freq 2"
CELL = (
    "Genotype(normal=[[('sep_conv_3x3', 0), ('skip_connect', 1)]], normal_concat=[2], "
    "reduce=[[('max_pool_3x3', 0), ('dil_conv_3x3', 1)]], reduce_concat=[2])"
)
VARIANT = "--nodes 1 --variant pc-darts,beta-darts,snas --pc-share 2 --pc-warm-up 1 --early-stop"
STAGES = {"search": [*VARIANT.split(), *SMALL.split()], "augment": ["--genotype", CELL, *SMALL.split()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="(default: both)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this long")
    parser.add_argument("--runs", type=int, default=50, help="of each stage, at most (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, help="of each run, at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a copy of a process that has used OpenMP's threads would wait for them for ever
    end, chance, failed = time.monotonic() + 60 * args.minutes, random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            print(f"{stage}: a run left alone", flush=True)
            started = time.monotonic()
            if wait(start(folder, stage, "alone")) != 0:
                sys.exit(Path(folder, f"{stage}-alone.txt").read_text())
            seconds = time.monotonic() - started
            reference = outcome(Path(folder, "runs", stage, "alone"))
            done = kills = same = 0
            while done < args.runs and time.monotonic() < end:
                killed, steps = disturbed(folder, stage, "killed", args.kills, seconds, chance)
                differing = differences(reference, outcome(Path(folder, "runs", stage, "killed")))
                done, kills, same = done + 1, kills + killed, same + (not differing)
                print(f"{stage} run {done}: killed after steps {steps}: {differing[:5] or 'identical'}", flush=True)
                shutil.rmtree(Path(folder, "runs", stage, "killed"))
            failed += done - same
            print(f"{stage}: {same} of {done} runs identical to the one left alone, {kills} kills", flush=True)
    sys.exit(failed > 0)


def start(folder, stage, name, resume=False):
    """A process that runs a stage's script: a copy of this one, which has loaded the libraries. Returns its id."""
    run = Path(folder, "runs", stage, name)
    words = ["--resume", run] if resume else [*STAGES[stage], "--name", name]
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.chdir(folder)
        output = os.open(f"{stage}-{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [f"{stage}.py", *map(str, words)]
        runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process, seconds=math.inf):
    """The exit code of a process, or None if it hasn't ended after this long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)


def disturbed(folder, stage, name, kills, seconds, chance):
    """Run, killed at instants up to `seconds` after each start, and at last left to end.

    Returns the number of kills, and the step that the checkpoint was at after each.
    """
    run, steps = Path(folder, "runs", stage, name), []
    while True:
        process = start(folder, stage, name, resume=(run / "config.json").exists())
        code = wait(process, chance.uniform(0, 1) * seconds if len(steps) < kills else math.inf)
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            steps.append(load_checkpoint(run / "checkpoint.pt")["step"] if (run / "checkpoint.pt").exists() else None)
            continue
        if code != 0:
            raise RuntimeError(Path(folder, f"{stage}-{name}.txt").read_text())
        if len(steps) >= kills:
            return len(steps), steps
        shutil.rmtree(run)  # done before it was killed often enough
        steps.clear()


if __name__ == "__main__":
    main()
