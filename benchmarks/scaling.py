"""A search step on 1, 2 and 4 ranks: time, and bytes sent; and a model of many GPUs from what was measured.

    python benchmarks/scaling.py                          # CPUs, gloo
    python benchmarks/scaling.py --cuda --ranks 1 2 4 8   # a GPU each, nccl

Ranks share this machine's processors, so that on CPUs a time says what sharing costs, not what more processors gain.
The model takes the compute of one step on one rank and the bytes that a step sends, both measured here.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architect import Architect
from benchmarks.paired import machine
from config import SearchConfig
from machine import ranks
from models.search_cnn import SearchCNN
from models.sync_bn import synchronise

# assumed: bytes a second that a GPU sends, seconds that a message takes from a rank to the next, and the most ranks
INTERCONNECTS = {
    "NVLink 4, one machine (450 GB/s)": (450e9, 3e-6, 8),
    "InfiniBand NDR, a port a GPU (50 GB/s)": (50e9, 5e-6, math.inf),
    "Ethernet 100 Gb/s for 8 GPUs (1.56 GB/s each)": (100e9 / 8 / 8, 20e-6, math.inf),
    "Ethernet 10 Gb/s for 8 GPUs (0.16 GB/s each)": (10e9 / 8 / 8, 30e-6, math.inf),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--order", default="second", choices=("second", "first"))
    parser.add_argument("--sync-bn", action="store_true", help="statistics of the global batch")
    parser.add_argument("--size", type=int, default=8, help="pixels a side (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images, over all ranks (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (default: %(default)s)")
    parser.add_argument("--gpu-step", type=float, metavar="S", help="for the model: seconds of a step on one GPU")
    parser.add_argument("--cuda", action="store_true", help="on GPUs")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        with ranks.group():
            return serve(args)
    print(
        f"{machine()}; {args.order}-order step, batch {args.batch_size} over all ranks, {args.size}x{args.size}, "
        f"C = {args.init_channels}, {args.layers} cells, {'global' if args.sync_bn else 'per-rank'} BN; "
        f"n = {args.rounds} after one for warming up"
    )
    measured = measure(args)
    one = measured[args.ranks[0]]
    print(
        f"\n{'':35}messages of a step   MB sent by each rank\nranks   median s (range){'':12}number      MB"
        "     counted    by a ring    at least"
    )
    for n, result in measured.items():
        payload, seconds = result["payload"], result["seconds"]
        range_of = f"{statistics.median(seconds):7.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        sent = [result["sent"] / n, ring(payload, n), ring(result["needed"], n)]
        columns = "".join(f"{count / 1e6:12.2f}" for count in sent)
        print(f"{n:5}   {range_of}   {result['messages']:6}{payload / 1e6:8.2f}{columns}")
    print(NOTE)
    step = args.gpu_step or statistics.median(one["seconds"])
    many = measured[max(args.ranks)]
    model(step, "given" if args.gpu_step else "measured here", many["payload"], many["messages"])


NOTE = """
Messages: what all-reduce is called with. Counted: by the kernel, on the loopback interface (0 where it doesn't say),
protocol and all. By a ring: 2 (n - 1) / n times the messages, below which no all-reduce can be. At least: the same for
what a step cannot do without, the gradients of w at w, of w' for d, and of w for the step, and the alphas' two."""


def ring(payload, n):
    """Bytes that each of n ranks sends in an all-reduce of this many."""
    return 2 * (n - 1) / n * payload


def measure(args):
    """ranks -> {"seconds", "messages", "payload", "needed"}, the ranks' steps taken in turn."""
    results, workers = {}, {}
    words = [
        word
        for name in ("order", "size", "batch_size", "init_channels", "layers")
        for word in ("--" + name.replace("_", "-"), str(getattr(args, name)))
    ]
    words += ["--sync-bn"] * args.sync_bn + ["--cuda"] * args.cuda
    threads = max(1, torch.get_num_threads() // max(args.ranks))
    for n in args.ranks:  # the same threads for each rank, whatever their number
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__]
        workers[n] = subprocess.Popen(
            command + words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        results[n] = {"seconds": []}
    for i in range(args.rounds + 1):
        for n, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            if i > 0:
                results[n]["seconds"].append(answer.pop("seconds"))
                results[n] |= answer
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return results


def serve(args):
    """A rank's side: a step for each line that rank 0 reads, which answers with its time and what it sent."""
    counted = Counter()
    step, weights, alphas = step_of(args)
    while ranks.on_rank_0(lambda: bool(sys.stdin.readline())):
        counted.clear()
        ranks.wait()
        before = loopback_bytes()
        start = time.perf_counter()
        step()
        if args.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        ranks.wait()
        if ranks.rank() == 0:
            needed = 4 * (3 * weights + 2 * alphas if args.order == "second" else weights + alphas)
            answer = {"seconds": seconds, "messages": counted.messages, "payload": counted.bytes, "needed": needed}
            print(json.dumps(answer | {"sent": loopback_bytes() - before}), flush=True)


def loopback_bytes():
    """Bytes sent so far over the loopback interface, where Linux tells."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text().splitlines() if counters.is_file() else []
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)


class Counter:
    """Counts the calls of all-reduce, and the bytes they are called with."""

    def __init__(self):
        self.clear()
        original = dist.all_reduce

        def all_reduce(tensor, *args, **kwargs):
            self.messages += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return original(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce

    def clear(self):
        self.messages = self.bytes = 0


def step_of(args):
    """A step of the search as search.py takes it, and the numbers of weights and alphas."""
    device = torch.device("cuda", ranks.local_rank()) if args.cuda else torch.device("cpu")
    torch.manual_seed(0)
    net = SearchCNN(3, args.init_channels, 10, args.layers, nn.CrossEntropyLoss())
    net = net.to(device, memory_format=torch.channels_last).train()
    if args.sync_bn:
        synchronise(net)
    rows = ranks.rows(args.batch_size)
    X = torch.randn(args.batch_size, 3, args.size, args.size)[rows].to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch_size,))[rows].to(device)
    config = SearchConfig([])
    weights, xi = list(net.weights()), config.w_lr if args.order == "second" else 0.0
    w_optim = torch.optim.SGD(weights, config.w_lr, momentum=0.9, weight_decay=3e-4)
    alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999))
    architect = Architect(net, 0.9, 3e-4)

    def step():
        architect.unrolled_backward(X, y, X, y, xi, w_optim)
        alpha_optim.step()
        w_optim.zero_grad()
        loss = net.loss(X, y)
        ranks.row_weighted(loss, y).backward(inputs=weights)
        ranks.average_step(loss.detach(), net, weights, y, args.sync_bn)
        nn.utils.clip_grad_norm_(weights, config.w_grad_clip)
        w_optim.step()

    return step, sum(w.numel() for w in weights), sum(alpha.numel() for alpha in net.alphas())


def model(step, source, payload, messages):
    """Print the model: the share of a step that is computing, when every GPU has the batch that one had."""
    print(
        f"\nComputed, not measured: a batch of its own on each GPU, {step:.3f} s of computing a step ({source}), "
        f"{payload / 1e6:.2f} MB in {messages} messages, none of it hidden behind computing."
    )
    print(f"{'share of the time that is computing':48}" + "".join(f"{n:>5} GPUs" for n in (8, 64, 512)))
    for name, (bandwidth, latency, most) in INTERCONNECTS.items():
        shares = []
        for n in (8, 64, 512):
            seconds = messages * all_reduce(payload / messages, n, bandwidth, latency)
            shares.append(f"{step / (step + seconds):9.1%} " if n <= most else f"{'-':>9} ")
        print(f"{name:48}" + "".join(shares))


def all_reduce(size, n, bandwidth, latency):
    """Seconds of an all-reduce of this many bytes: by a ring or by a tree, whichever is faster."""
    by_ring = 2 * (n - 1) * latency + ring(size, n) / bandwidth
    return min(by_ring, 2 * math.log2(n) * latency + 2 * size / bandwidth)


if __name__ == "__main__":
    main()
