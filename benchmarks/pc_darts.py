"""Time and memory of a search step by PC-DARTS, with 1/K of the channels in the mixed operations.

    python benchmarks/pc_darts.py

K = 1 without edge normalisation is DARTS. A step of the warm-up is w's alone. Each case runs in a process of its own,
whose largest memory is that of the operating system's account (VmHWM, on Linux).
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architect import Architect
from config import SearchConfig
from models.search_cnn import SearchCNN
from variants import compose

CASES = [(1, 64), (4, 64), (4, 256)]  # K, batch size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="steps that count (default: %(default)s)")
    parser.add_argument("--case", type=int, help="of CASES, alone in this process")
    args = parser.parse_args()
    if args.case is not None:
        return print_case(*CASES[args.case], args.rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, images of 3 x 32 x 32", flush=True)
    for case in range(len(CASES)):
        subprocess.run([sys.executable, __file__, "--case", str(case), "--rounds", str(args.rounds)], check=True)


def print_case(K, batch_size, rounds):
    torch.manual_seed(0)
    words = ["--variant", "pc-darts", "--pc-share", str(K), "--pc-edge-normalisation", "off" if K == 1 else "on"]
    kind, architect_kind = compose(SearchConfig(words), SearchCNN, Architect)
    net = kind(3, 16, 10, 8, nn.CrossEntropyLoss()).to(memory_format=torch.channels_last).train()
    images = [torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last) for _ in range(2)]
    trn, val = [(X, torch.randint(10, (batch_size,))) for X in images]
    weights = list(net.weights())
    optim = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    architect = architect_kind(net, 0.9, 3e-4)
    for name, xi in (("warm-up", None), ("first order", 0.0), ("second order", 0.025)):
        seconds, cpu_seconds = [], []
        for _ in range(rounds + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            if xi is not None:
                architect.unrolled_backward(*trn, *val, xi, optim)
                optim.zero_grad()
            net.loss(*trn).backward(inputs=weights)
            optim.step()
            optim.zero_grad()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1e6
        print(
            f"K = {K}, batch {batch_size}, {name}: {spread(seconds[1:])} a step, "
            f"{spread(cpu_seconds[1:])} of CPU time, at most {peak:.2f} GB",
            flush=True,
        )


def spread(seconds):
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
