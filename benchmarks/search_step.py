"""A search step, fused against plain: time, peak memory, operations launched.

    python benchmarks/search_step.py                # 32x32 and 8x8 images, first and second order
    python benchmarks/search_step.py --growth       # how time and memory grow with the batch and with C
    python benchmarks/search_step.py --cuda         # on a GPU, by events and allocated memory

`plain` is the definition: module by module, NCHW. All run in turn, each in a process of its own, whose peak resident
memory is given; times are to be compared within a run only.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launches import Launches

from architect import Architect
from benchmarks.paired import compare, machine, report, serve
from models.fast import search_cell
from models.search_cnn import SearchCNN

WAYS = ("plain", "fused", "fused, --recompute")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 8], help="pixels a side (default: 32 8)")
    parser.add_argument("--orders", nargs="+", default=["second", "first"], choices=("second", "first"))
    parser.add_argument("--batch-size", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--json", metavar="FILE", help="add all times to this file")
    parser.add_argument("--growth", action="store_true", help="the fused step alone, over batch sizes and channels")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(step_of(args.serve, args.sizes[0], args.orders[0], args), args.cuda)
    print(f"{machine()}; {args.layers} cells; n = {args.rounds} rounds after one for warming up")
    if args.growth:
        return growth(args)
    for size in args.sizes:
        for path, count in launches(size, args).items():
            print(f"{size}x{size}: operations launched by a forward and backward pass, {path}: {count}", flush=True)
    for size in args.sizes:
        for order in args.orders:
            ways = {way: words(way, size, order, args) for way in WAYS}
            title = f"{order}-order step, batch {args.batch_size}, {size}x{size}, C = {args.init_channels}"
            report(title, compare(__file__, ways, args.rounds), "plain", args.json)


def words(way, size, order, args, **changes):
    options = {"batch_size": args.batch_size, "init_channels": args.init_channels, "layers": args.layers} | changes
    listed = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    return [way, "--sizes", size, "--orders", order, *listed, *["--cuda"] * args.cuda]


def network(way, size, args, device="cpu"):
    """A network and two batches, on a device in the memory format that its execution runs in."""
    torch.manual_seed(0)
    net = SearchCNN(
        3,
        args.init_channels,
        10,
        args.layers,
        nn.CrossEntropyLoss(),
        execution=way.split(",")[0],
        recompute="--recompute" in way,
    )
    memory_format = torch.contiguous_format if way == "plain" else torch.channels_last
    batches = [
        (
            torch.randn(args.batch_size, 3, size, size).to(device, memory_format=memory_format),
            torch.randint(10, (args.batch_size,)).to(device),
        )
        for _ in range(2)
    ]
    return net.to(device, memory_format=memory_format).train(), *batches


def step_of(way, size, order, args):
    """A function that takes one step of the search, as search.py does: alpha's gradient, then w."""
    net, trn, val = network(way, size, args, "cuda" if args.cuda else "cpu")
    weights, xi = list(net.weights()), 0.025 if order == "second" else 0.0
    w_optim = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    alpha_optim = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    architect = Architect(net, 0.9, 3e-4)

    def step():
        architect.unrolled_backward(*trn, *val, xi, w_optim)
        alpha_optim.step()
        w_optim.zero_grad()
        net.loss(*trn).backward(inputs=weights)
        nn.utils.clip_grad_norm_(weights, 5.0)
        w_optim.step()

    step.keeps = net, w_optim, alpha_optim
    return step


def launches(size, args):
    """Operations of one forward and backward pass, counted on the CPU, whichever path would run there."""
    counts, chosen = {}, search_cell.layout_for
    for name in ("plain", "fused, edge by edge as on the CPU", "fused, batched as on CUDA"):
        search_cell.layout_for = (lambda x: search_cell.BATCHED) if "CUDA" in name else chosen
        small = argparse.Namespace(**vars(args) | {"batch_size": 4})  # the count does not depend on it
        net, trn, _ = network(name, size, small)
        with Launches() as counter:
            net.loss(*trn).backward(inputs=list(net.weights()) + list(net.alphas()))
        counts[name] = counter.count
    search_cell.layout_for = chosen
    return counts


def growth(args):
    size = args.sizes[0]
    for name, values in (("batch_size", (16, 32, 64, 128)), ("init_channels", (8, 16, 32))):
        ways = {f"{name} {value}": words("fused", size, "second", args, **{name: value}) for value in values}
        report(f"second-order step, fused, {size}x{size}", compare(__file__, ways, args.rounds), next(iter(ways)))


if __name__ == "__main__":
    main()
