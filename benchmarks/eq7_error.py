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
from torch.nn.utils import parameters_to_vector

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
    parser.add_argument("--seeds", type=int, default=5, help="number of networks and batches (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="number of cells (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16, help="initial channels (default: %(default)s)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {vars(args)}", flush=True)
    errors = {(smooth, scale): [] for scale in SCALES for smooth in (False, True)}
    for seed in range(args.seeds):
        for smooth in (False, True):
            for scale, error in measure(seed, smooth, args):
                errors[smooth, scale].append(error)
        print(f"seed {seed} done", flush=True)
    for (smooth, scale), values in errors.items():
        network = "softplus and average pool" if smooth else "ReLU and max pool"
        spread = f"{statistics.median(values):10.3g} ({min(values):.2g} to {max(values):.2g})"
        print(f"eps_scale {scale:<7g} {network:26} {spread}")


def measure(seed, smooth, args):
    """Yield (eps_scale, relative difference) of a network after ten steps of SGD on digits."""
    _, channels, n_classes, data = get_data("digits", "", 0, False, seed=seed)
    torch.manual_seed(seed)
    net = SearchCNN(channels, args.init_channels, n_classes, args.layers, nn.CrossEntropyLoss()).double()
    if smooth:
        smoothed(net)
    optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4)
    loader = Loader(data, range(len(data)), 64, torch.device("cpu"), seed=seed)
    batches = [(X.double(), y) for X, y, _ in loader.epoch(1)]
    for X, y in batches[:10]:
        optim.zero_grad()
        net.loss(X, y).backward(inputs=list(net.weights()))
        optim.step()
    trn, val = batches[10:12]
    d = torch.autograd.grad(net.loss(*val), list(net.weights()))
    exact = parameters_to_vector(hessian_product(net, d, trn))
    for scale in SCALES:
        hessian = parameters_to_vector(Architect(net, 0.9, 3e-4, eps_scale=scale).compute_hessian(d, *trn))
        yield scale, ((hessian - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main()
