"""Selection by perturbation (DARTS-PT, Wang et al., arXiv:2108.04392): what the trained network can spare least."""

import logging
import random
from collections.abc import Callable
from typing import Any

import torch

from images.loading import Loader
from machine import ranks
from models.search_cnn import SearchCNN


def select_by_perturbation(
    net: SearchCNN, loader: Loader, tune: Callable[[], None], seed: int, n_edges: int = 2
) -> Any:
    """The genotype of the operations whose removal costs a trained network most accuracy (Algorithm 1 of DARTS-PT).

    Edge by edge in random order, the best candidate is the one without which the network is worst; it then is alone on
    its edge. If the space chooses edges, each node keeps the n_edges without which the network is worst, node by node
    in random order.

    loader: the images that accuracy is measured on; tune: trains the network's weights between two decisions. The
    network's weights of candidates are the chosen ones afterwards.
    """
    weights = net.edge_weights
    choice = Choice(weights())
    columns = [net.primitives.index(name) for name in net.space.choosable(net.primitives)]
    generator, logger = random.Random(seed), logging.getLogger("darts")
    sizes = {(kind, i): len(node) for kind, nodes in choice.fixed.items() for i, node in enumerate(nodes)}
    edges = [(kind, i, s) for (kind, i), size in sizes.items() for s in range(size)]
    nodes = [place for place, size in sizes.items() if size > n_edges]
    generator.shuffle(edges)
    generator.shuffle(nodes)
    net.edge_weights = lambda noise=None: choice.applied(weights(noise))
    strengths = {kind: [torch.zeros_like(node) for node in fixed] for kind, fixed in choice.fixed.items()}

    for done, (kind, i, s) in enumerate(edges):
        if done > 0:
            tune()
        top1 = {}
        for column in columns:
            choice.mask[kind][i][s, column] = 0
            top1[column] = accuracy(net, loader)
            choice.mask[kind][i][s, column] = 1
        best = min(top1, key=lambda column: (top1[column], net.primitives[column] == "none"))  # none costs nothing
        choice.fix(kind, i, s, best)
        strengths[kind][i][s, best] = 1
        losses = ", ".join(f"{net.primitives[column]} {value:.2%}" for column, value in top1.items())
        logger.info(f"{kind}, edge {s} of node {i}: {net.primitives[best]}; accuracy without {losses}")

    for kind, i in nodes if net.space.chooses_edges else ():
        tune()
        fixed, top1 = choice.fixed[kind][i], {}
        for s, row in enumerate(fixed.clone()):
            fixed[s] = 0
            top1[s] = accuracy(net, loader)
            fixed[s] = row
        kept = sorted(top1, key=top1.__getitem__)[:n_edges]
        for s in top1.keys() - set(kept):
            fixed[s] = 0
        for place, s in enumerate(reversed(kept), 2):  # above the 1 of edges that are not kept
            strengths[kind][i][s] *= place
        without = ", ".join(f"{s} {value:.2%}" for s, value in top1.items())
        logger.info(f"{kind}, node {i}: edges {kept}; accuracy without edge {without}")
    return net.space.genotype(strengths, n_edges, net.primitives)


class Choice:
    """What is decided: candidates that are left out (mask 0), and the weights of edges that are `fixed`, else NaN."""

    def __init__(self, weights: dict[str, list[torch.Tensor]]):
        self.mask = {kind: [torch.ones_like(node) for node in nodes] for kind, nodes in weights.items()}
        self.fixed = {kind: [torch.full_like(node, torch.nan) for node in nodes] for kind, nodes in weights.items()}

    def fix(self, kind: str, node: int, source: int, column: int) -> None:
        """Let one candidate be alone on an edge."""
        self.fixed[kind][node][source] = 0
        self.fixed[kind][node][source, column] = 1

    def applied(self, weights: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        """The weights with what is decided."""
        return {
            kind: [
                torch.where(fixed.isnan(), node * mask, fixed)
                for node, mask, fixed in zip(nodes, self.mask[kind], self.fixed[kind])
            ]
            for kind, nodes in weights.items()
        }


@torch.no_grad()
def accuracy(net: SearchCNN, loader: Loader) -> float:
    """The fraction of the loader's images that the network classifies rightly, over all ranks."""
    net.eval()
    right, images = 0.0, 0
    for X, y, n in loader.epoch(0):
        (share,) = ranks.average([ranks.row_weighted((net(X).argmax(1) == y).to(X.dtype).mean(), y)], y)
        right, images = right + n * share.item(), images + n
    return right / images
