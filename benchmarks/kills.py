"""Kills runs at random instants, lets them go on, and compares what they leave with a run left alone, bit by bit.

    python benchmarks/kills.py search --kills 50              # or augment
    python benchmarks/kills.py search --kills 50 --ranks 3    # kills one of three ranks; torchrun restarts all of them

The runs are small ones on the digits, and save after every step. Each is killed with SIGKILL up to three times, four
times in five while it takes its steps, else while it starts. The exit code is 1 if a run differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comparing import differences, outcome

KILLS_PER_RUN = 3
SMALL = "--layers 3 --init-channels 2 --batch-size 256 --epochs 4 --workers 0 --checkpoint-minutes 0 --print-freq 2"
VARIANT = "--nodes 1 --variant pc-darts,beta-darts,snas --pc-share 2 --pc-warm-up 1"
OPTIONS = {"search": f"{VARIANT} {SMALL}", "augment": f"--genotype DARTS_V2 {SMALL}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=OPTIONS)
    parser.add_argument("--options", help='options of the runs besides their size, such as "--space nas-bench-201"')
    parser.add_argument("--kills", type=int, default=50, help="number of kills in all runs (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants (default: %(default)s)")
    args = parser.parse_args()
    chance, kills, runs, same = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        alone = Run(args, folder, "alone")
        alone.wait_for_save()
        seconds_to_start = time.monotonic() - alone.started
        alone.wait_for_end()
        seconds_of_steps = time.monotonic() - alone.started - seconds_to_start
        while kills < args.kills:
            run = Run(args, folder, "killed")
            for _ in range(min(KILLS_PER_RUN, args.kills - kills)):
                if chance.random() < 0.8:
                    run.wait_for_save()
                    time.sleep(chance.uniform(0, seconds_of_steps))
                else:
                    time.sleep(chance.uniform(0, seconds_to_start))
                kills += run.kill(chance)
            run.wait_for_end()
            different = differences(outcome(alone.folder), outcome(run.folder))
            runs, same = runs + 1, same + (not different)
            print(f"run {runs}: killed after steps {run.steps}: {different[:5] or 'identical'}", flush=True)
            shutil.rmtree(run.folder)
    print(f"{args.stage}: {same} of {runs} runs identical to the one left alone, {kills} kills")
    sys.exit(same < runs)


class Run:
    """A run of a stage's script, which torchrun starts if it has several ranks."""

    def __init__(self, args, folder, name):
        self.ranks, self.cwd, self.steps = args.ranks, folder, []
        self.folder, self.output = Path(folder, "runs", args.stage, name), Path(folder, f"{name}.txt")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        torchrun += ["--max-restarts", str(KILLS_PER_RUN)]
        options = f"{args.options} {SMALL}" if args.options else OPTIONS[args.stage]
        script = [str(ROOT / f"{args.stage}.py"), *options.split(), "--name", name, "--auto-resume"]
        self.command = [sys.executable, *(torchrun if args.ranks > 1 else []), *script]
        self.start()

    def start(self):
        """Start it, or go on with it after a kill."""
        self.started, self.save_before = time.monotonic(), self.last_save()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.output.open("a") as file:
            self.process = subprocess.Popen(self.command, cwd=self.cwd, stdout=file, stderr=file, env=environment)

    def last_save(self):
        checkpoint = self.folder / "checkpoint.pt"
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None

    def wait_for_save(self):
        """Until it has saved since its last start, or has ended."""
        while self.last_save() == self.save_before and self.process.poll() is None:
            time.sleep(0.01)

    def wait_for_end(self):
        if self.process.wait() != 0:
            sys.exit(self.output.read_text())

    def kill(self, chance):
        """Kill it, or one of its ranks, and let it go on. Returns whether it had not ended before."""
        processes = [self.process.pid] if self.ranks == 1 else self.children()
        while len(processes) < self.ranks and self.process.poll() is None:
            processes = self.children()
        if self.process.poll() is not None:
            return False
        os.kill(chance.choice(processes), signal.SIGKILL)
        self.steps.append(torch.load(self.folder / "checkpoint.pt")["step"] if self.last_save() else None)
        if self.ranks == 1:
            self.process.wait()
            self.start()
        while self.ranks > 1 and set(processes) & set(self.children()):
            time.sleep(0.01)  # torchrun ends the other ranks, and starts all of them again
        self.save_before = self.last_save()
        return True

    def children(self):
        process = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return list(map(int, process.stdout.split()))


if __name__ == "__main__":
    main()
