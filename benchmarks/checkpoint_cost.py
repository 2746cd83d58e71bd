"""What checkpoints add to an epoch of the default search, CIFAR-10's size: measured parts, put together.

    python benchmarks/checkpoint_cost.py

An epoch has 390 second-order steps. At default settings it saves once at its end, as best.pt too, and every 10 minutes;
after each step the run notes where it is.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.paired import machine
from benchmarks.search_step import step_of
from config import SearchConfig
from run.progress import Meters
from run.run import Run

STEPS = 390


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=20, help="checkpoints that are timed (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = SearchConfig(["--runs-path", folder, "--workers", "0"])
        size = argparse.Namespace(batch_size=64, init_channels=16, layers=8, cuda=torch.cuda.is_available())
        step = step_of("fused", 32, "second", size)
        net, w_optim, alpha_optim = step.keeps
        steps = timed(step, args.rounds)
        run = Run(config)
        run.start({"net": net, "w_optim": w_optim, "alpha_optim": alpha_optim}, {"found": {}, "history": []})
        saves = timed(lambda: run.save(is_best=True), args.saves)
        meters = Meters(run, "", n_steps=2)
        notes = timed(lambda: run.note_position(meters), 1000)
        size = run.folder.checkpoint.stat().st_size / 1e6
        run.tensorboard.close()
    epoch = STEPS * statistics.median(steps)
    in_between = epoch / (60 * config.checkpoint_minutes)
    added = (1 + in_between) * statistics.median(saves) + STEPS * statistics.median(notes)
    print(machine())
    print(f"a step: {show(steps)} s; a checkpoint and best.pt, {size:.1f} MB each: {show(saves)} s")
    print(f"a note of the position: {show([1e6 * n for n in notes])} microseconds")
    share = 100 * added / epoch
    print(f"added to an epoch of {epoch:.0f} s with {in_between:.1f} checkpoints in between: {share:.3f} %")


def timed(function, n):
    """Seconds of n calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return seconds


def show(numbers):
    return f"{statistics.median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g}, n = {len(numbers)})"


if __name__ == "__main__":
    main()
