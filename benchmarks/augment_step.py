"""A training step of the augment network as augment.py runs it (channels-last), against NCHW: time, peak memory.

    python benchmarks/augment_step.py
    python benchmarks/augment_step.py --cuda [--amp]

In NCHW every module is PyTorch's own. Both run in turn, each in a process of its own.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.paired import compare, machine, report, serve
from genotypes import DARTS_V2
from models.augment_cnn import AugmentCNN

WAYS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=96, help="images (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=36, help="channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=20, help="cells (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps of each (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--json", metavar="FILE", help="add all times to this file")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(step_of(args), args.cuda)
    print(f"{machine()}; n = {args.rounds} rounds after one for warming up")
    names = ("size", "batch_size", "init_channels", "layers")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", getattr(args, name))]
    flags = [*["--cuda"] * args.cuda, *["--amp"] * args.amp]
    ways = {way: [way, *options, *flags] for way in WAYS}
    title = f"training step of DARTS_V2, {args.layers} cells, C = {args.init_channels}, batch {args.batch_size}"
    title += ", mixed precision" * args.amp
    report(f"{title}, {args.size}x{args.size}", compare(__file__, ways, args.rounds), "NCHW", args.json)


def step_of(args):
    """A function that takes one step, as augment.py does."""
    torch.manual_seed(0)
    device, memory_format = "cuda" if args.cuda else "cpu", WAYS[args.serve]
    net = AugmentCNN(args.size, 3, args.init_channels, 10, args.layers, True, DARTS_V2)
    net = net.to(device, memory_format=memory_format).train()
    net.drop_path_prob(0.1)
    X = torch.randn(args.batch_size, 3, args.size, args.size).to(device, memory_format=memory_format)
    y = torch.randint(10, (args.batch_size,)).to(device)
    criterion = nn.CrossEntropyLoss()
    optim = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=args.amp):
            logits, aux_logits = net(X)
            loss = criterion(logits, y) + 0.4 * criterion(aux_logits, y)
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optim.step()

    return step


if __name__ == "__main__":
    main()
