"""The operations whose removal costs the network most.  python -m examples.select_by_removal --dataset cifar10"""

import math

import torch

import search


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
    losses = iter(losses)
    strengths = {kind: [next(losses) for _ in alphas] for kind, alphas in net.alpha.items()}
    return net.space.genotype(strengths, 2, net.primitives)


if __name__ == "__main__":
    search.main(select=select_by_removal)
