"""The published variants of DARTS: each is what it changes of `SearchCNN` and `Architect`, and inherits all else.

python search.py --variant pc-darts
python search.py --variant pc-darts,beta-darts

A variant is a class for the network or for the architect, or both, named in `VARIANTS`. `compose` puts those of a run
in front of the classes that they change, so that `super()` is DARTS, or the next variant. `self.options` are the run's.
docs/variants.md says what each is for; models/choices.py, which of them can be combined.
"""

import functools

import torch
from torch import nn

from models.ops import MixedOp, PartialMixedOp
from running.errors import UserError

KINDS = ("normal", "reduce")


class PCDarts:
    """PC-DARTS (Xu et al., arXiv:1907.05737): 1/K of the channels are searched, edges are normalised, alphas wait.

    `beta_normal` and `beta_reduce` hold a number for each edge of a node, which learn as the alphas do.
    """

    def __init__(self, C_in, C, *args, **kwargs):
        if C % self.options.pc_share:
            raise UserError(f"--pc-share {self.options.pc_share} must divide --init-channels {C}")
        super().__init__(C_in, C, *args, **kwargs)
        if self.options.pc_edge_normalisation == "on":
            self.beta_normal, self.beta_reduce = (
                nn.ParameterList(nn.Parameter(1e-3 * torch.randn(i + 2)) for i in range(self.n_nodes)) for _ in KINDS
            )

    @property
    def mixed_op(self):
        return functools.partial(PartialMixedOp, K=self.options.pc_share)

    def edge_weights(self, noise=None):
        weights = super().edge_weights(noise)
        if self.options.pc_edge_normalisation == "off":
            return weights
        betas = {"normal": self.beta_normal, "reduce": self.beta_reduce}
        return {
            kind: [w * beta.softmax(0).unsqueeze(1) for w, beta in zip(weights[kind], betas[kind])] for kind in KINDS
        }

    def alphas(self):
        yield from super().alphas()
        if self.options.pc_edge_normalisation == "on":
            yield from self.beta_normal
            yield from self.beta_reduce

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.alphas_learn = epoch > self.options.pc_warm_up


class BetaDarts:
    """beta-DARTS (Ye et al., arXiv:2203.01665): a penalty on large alphas, which rises in the course of the search."""

    penalty = 0.0  # lambda

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.penalty = self.options.beta_strength * (epoch - 1) / epochs


class BetaDartsObjective:
    def alpha_objective(self, X, y):
        net, loss = self.net, super().alpha_objective(X, y)
        if net.penalty == 0:
            return loss
        edges = torch.cat([*net.alpha_normal, *net.alpha_reduce])
        return loss + net.penalty * edges.logsumexp(1).mean()


class DartsMinus:
    """DARTS- (Chu et al., arXiv:2009.01027): an auxiliary skip connection on every edge, which fades out.

    It stands beside the candidates, after them in `_ops`, so that it is no choice of the genotype's.
    """

    auxiliary_weight = 0.0  # beta

    @property
    def mixed_op(self):
        if self.options.minus_strength == 0:
            return super().mixed_op
        return lambda C, stride, primitives: MixedOp(C, stride, [*primitives, "skip_connect"])

    def operation_weights(self, noise=None):
        weights = super().operation_weights(noise)
        if self.options.minus_strength == 0:
            return weights
        return {
            kind: [nn.functional.pad(w, (0, 1), value=self.auxiliary_weight) for w in weights[kind]] for kind in KINDS
        }

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.auxiliary_weight = self.options.minus_strength * (1 - (epoch - 1) / epochs)


# name -> (class for the network, class for the architect), None where DARTS's stays as it is
VARIANTS = {
    "pc-darts": (PCDarts, None),
    "beta-darts": (BetaDarts, BetaDartsObjective),
    "darts-minus": (DartsMinus, None),
}


def compose(options, network, architect):
    """The classes of the network and the architect for a run with these options: those given, with its variants."""
    if options.variant is None:
        return network, architect
    names = options.variant.split(",")
    changed = []
    for i, base in enumerate((network, architect)):
        parts = [VARIANTS[name][i] for name in names if VARIANTS[name][i] is not None]
        name = "".join(part.__name__ for part in parts) + base.__name__
        changed.append(type(name, (*parts, base), {"options": options}))
    return changed
