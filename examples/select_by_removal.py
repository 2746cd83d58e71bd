"""The operations whose removal costs the network most.  python -m examples.select_by_removal --dataset cifar10"""

import math

import torch

import search
from models.genotype import Genotype, parse


@torch.no_grad()
def select_by_removal(net, w_loader, alpha_loader):
    X, y, _ = next(alpha_loader.epoch(0))
    net.eval()
    losses = [torch.zeros_like(alpha) for alpha in net.alphas()]
    for alpha, loss in zip(net.alphas(), losses):
        for place in torch.ones_like(alpha).nonzero().unbind():
            kept = alpha[tuple(place)].clone()
            alpha[tuple(place)] = -math.inf
            loss[tuple(place)] = net.loss(X, y)
            alpha[tuple(place)] = kept
    normal, reduce = (parse(part, 2, net.primitives) for part in (losses[: net.n_nodes], losses[net.n_nodes :]))
    return Genotype(normal, range(2, 2 + net.n_nodes), reduce, range(2, 2 + net.n_nodes))


if __name__ == "__main__":
    search.main(select=select_by_removal)
