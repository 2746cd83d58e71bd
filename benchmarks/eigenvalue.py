"""What the dominant eigenvalue after an epoch costs, and why it is not taken from differences of gradients.

    python benchmarks/eigenvalue.py

1. CPU seconds of a step of the default search and of the eigenvalue, at 32 x 32 pixels, with the share of an epoch of
   CIFAR-10 (390 steps of 64 images) and, at 8 x 8 pixels, of one of digits (11 steps), steps alone.
2. The eigenvalue of default networks after some steps on digits, by exact double differentiation and by central
   differences of gradients, (g(alpha + h v) - g(alpha - h v)) / (2 h) for unit vectors v, on the same images.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from architect import Architect
from config import SearchConfig
from evidence import curvature
from images.loading import Loader
from models.search_cnn import SearchCNN, frozen_statistics, tracking
from utils import get_data

SHIFTS = (1.0, 0.1, 0.01, 0.001)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks of part 2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of SGD before part 2 (default: %(default)s)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {vars(args)}", flush=True)
    for size, channels, steps in ((32, 3, 390), (8, 1, 11)):
        print_cost(size, channels, steps)
    print("seed   exact   by differences, h = " + ", ".join(map(str, SHIFTS)))
    for seed in range(args.seeds):
        exact, *differences = compare(seed, args.steps)
        print(f"{seed:4}  {exact:6.3f}   " + "  ".join(f"{value:8.3f}" for value in differences), flush=True)


def network(channels, seed=0):
    torch.manual_seed(seed)
    return SearchCNN(channels, 16, 10, 8, nn.CrossEntropyLoss()).to(memory_format=torch.channels_last)


def print_cost(size, channels, steps):
    net, config = network(channels), SearchConfig([])
    images = [torch.randn(64, channels, size, size).to(memory_format=torch.channels_last) for _ in range(2)]
    trn, val = [(X, torch.randint(10, (64,))) for X in images]
    weights = list(net.weights())
    optim = torch.optim.SGD(weights, config.w_lr, momentum=config.w_momentum, fused=True)
    architect = Architect(net, config.w_momentum, config.w_weight_decay)

    def step(xi):
        architect.unrolled_backward(*trn, *val, xi, optim)
        optim.zero_grad()
        net.loss(*trn).backward(inputs=weights)
        optim.step()

    n = curvature.images_within(config.eigenvalue_images, size)
    step(config.w_lr)
    seconds = {
        "second": cpu_seconds(lambda: step(config.w_lr)),
        "first": cpu_seconds(lambda: step(0.0)),
        "eigenvalue": cpu_seconds(lambda: curvature.dominant_eigenvalue(net, val[0][:n], val[1][:n])),
    }
    print(f"{size} x {size}: the eigenvalue of {n} images takes {seconds['eigenvalue']:.1f} s")
    for order in ("second", "first"):
        share = seconds["eigenvalue"] / seconds[order] / steps
        print(f"    a step of {order} order {seconds[order]:.2f} s: {share:.2%} of {steps} steps", flush=True)


def cpu_seconds(function, rounds=3):
    """The median CPU time, over all threads."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def compare(seed, steps):
    """The eigenvalue after some steps on digits: exact, and by differences for each of `SHIFTS`."""
    _, channels, _, data = get_data("digits", "", 0, False, seed=seed)
    net = network(channels, seed)
    optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4)
    loader = Loader(data, range(len(data)), 64, torch.device("cpu"), seed=seed)
    batches = [(X, y) for X, y, _ in loader.epoch(1)]
    for X, y in batches[:steps]:
        optim.zero_grad()
        net.loss(X, y).backward(inputs=list(net.weights()))
        optim.step()
    batch = batches[steps % len(batches)]
    yield curvature.dominant_eigenvalue(net, *batch, tolerance=0.001, max_products=20)
    for h in SHIFTS:
        start = torch.randn(224, generator=torch.Generator().manual_seed(0))
        yield curvature.lanczos(lambda v, h=h: difference(net, batch, v, h), start, 0.001, 20)


def difference(net, batch, v, h):
    """The Hessian's product with a unit vector v, by a central difference of gradients under the fused execution."""
    alphas, gradients = list(net.alphas()), []
    saved = [alpha.detach().clone() for alpha in alphas]
    for shift in (h, -h):
        with torch.no_grad():
            for alpha, old, part in zip(alphas, saved, v.split([alpha.numel() for alpha in alphas])):
                alpha.copy_(old + shift * part.view_as(alpha))
        with frozen_statistics(tracking(net)):
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(net.loss(*batch), alphas)]))
    with torch.no_grad():
        for alpha, old in zip(alphas, saved):
            alpha.copy_(old)
    return (gradients[0] - gradients[1]) / (2 * h)


if __name__ == "__main__":
    main()
