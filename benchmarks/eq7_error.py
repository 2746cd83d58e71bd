"""How far eq. 7's finite difference is from the exact Hessian product, on digits, in float64.

    python benchmarks/eq7_error.py

ReLU and max pooling are piecewise linear: exact differentiation sees the one linear piece that w lies in, while the
shift by eps * d crosses from piece to piece, and measures how the gradient jumps there too. The same network made
smooth (softplus for ReLU, average for max pooling) shows what is left without kinks. Prints the relative difference
||H - H_exact|| / ||H_exact|| for each eps_scale: the median over seeds, and the range.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exact import hessian_product, smoothed

from architect import Architect
from images.loading import Loader
from models.search_cnn import SearchCNN
from utils import get_data

SCALES = (1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="networks and batches (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of SGD before the measurement (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16, help="channels (default: %(default)s)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {vars(args)}", flush=True)
    errors = {smooth: {scale: [] for scale in SCALES} for smooth in (False, True)}
    for seed in range(args.seeds):
        for smooth in (False, True):
            for scale, error in measure(seed, smooth, args):
                errors[smooth][scale].append(error)
        print(f"seed {seed} done", flush=True)
    print("eps_scale   ReLU and max pool: median (range)      softplus and average pool: median (range)")
    for scale in SCALES:
        cells = (show(errors[smooth][scale]) for smooth in (False, True))
        print(f"{scale:<9g}   {'      '.join(cells)}")


def measure(seed, smooth, args):
    """Yield (eps_scale, relative difference) of a network after some steps on digits."""
    _, channels, n_classes, data = get_data("digits", "", 0, False, seed=seed)
    torch.manual_seed(seed)
    net = SearchCNN(channels, args.init_channels, n_classes, args.layers, nn.CrossEntropyLoss()).double()
    if smooth:
        smoothed(net)
    optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4)
    loader = Loader(data, range(len(data)), 64, torch.device("cpu"), seed=seed)
    batches = [(X.double(), y) for X, y, _ in loader.epoch(1)]
    for X, y in batches[: args.steps]:
        optim.zero_grad()
        net.loss(X, y).backward(inputs=list(net.weights()))
        optim.step()
    trn, val = batches[args.steps % len(batches)], batches[(args.steps + 1) % len(batches)]
    d = torch.autograd.grad(net.loss(*val), list(net.weights()))
    exact = flat(hessian_product(net, d, trn))
    for scale in SCALES:
        hessian = flat(Architect(net, 0.9, 3e-4, eps_scale=scale).compute_hessian(d, *trn))
        yield scale, ((hessian - exact).norm() / exact.norm()).item()


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def show(errors):
    return f"{statistics.median(errors):10.3g} ({min(errors):.2g} to {max(errors):.2g})"


if __name__ == "__main__":
    main()
