"""The published variants of DARTS: each is what it changes of `SearchCNN` and `Architect`, and inherits all else.

python search.py --variant pc-darts
python search.py --variant pc-darts,beta-darts

A variant is a class for the network or for the architect, or both, named in `VARIANTS`. `compose` puts those of a run
in front of the classes that they change, so that `super()` is DARTS, or the next variant. `self.options` are the run's.
docs/variants.md says what each is for; models/choices.py, which of them can be combined.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

from command_line.errors import UserError, warn
from models.choices import VARIANTS as CHANGES
from models.ops import MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN

KINDS = ("normal", "reduce")


def by_node(net, function, noise=None):
    """{kind of cell: [function(alpha) of each node's alphas]}, as `edge_weights` returns; or function(alpha, noise).

    alpha: (edges, candidates); noise: of the same form as what is returned, or None.
    """
    alphas = {"normal": net.alpha_normal, "reduce": net.alpha_reduce}
    if noise is None:
        return {kind: list(map(function, alphas[kind])) for kind in KINDS}
    return {kind: list(map(function, alphas[kind], noise[kind])) for kind in KINDS}


def all_edges(net):
    """The alphas of all edges of both cells, (edges, candidates)."""
    return torch.cat([*net.alpha_normal, *net.alpha_reduce])


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
        if epoch == 1 and self.options.pc_warm_up >= epochs:
            warn(f"alphas learn after --pc-warm-up {self.options.pc_warm_up} epochs, and so never in {epochs}")


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
        return loss + net.penalty * all_edges(net).logsumexp(1).mean()


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


class FairDarts:
    """Fair DARTS (Chu et al., arXiv:1911.12126): the sigmoid of alpha, so that candidates do not compete."""

    def edge_weights(self, noise=None):
        return by_node(self, torch.sigmoid)

    def genotype(self, *args, **kwargs):
        """Of DARTS's k edges those whose operation reaches the threshold; the strongest where none does."""
        genotype, weights = super().genotype(*args, **kwargs), self.edge_weights()
        cells = {kind: list(map(self._certain, getattr(genotype, kind), weights[kind])) for kind in KINDS}
        return genotype._replace(**cells)

    def _certain(self, node, weights):
        strengths = [weights[source, self.primitives.index(op)] for op, source in node]
        return [edge for edge, w in zip(node, strengths) if w >= self.options.fair_threshold] or node[:1]


class FairDartsObjective:
    def alpha_objective(self, X, y):
        loss, strength = super().alpha_objective(X, y), self.options.fair_strength
        if strength == 0:
            return loss
        return loss - strength * (all_edges(self.net).sigmoid() - 0.5).square().mean()  # the zero-one loss


class Snas:
    """SNAS (Xie et al., arXiv:1812.09926): weights are drawn from a concrete distribution, which grows colder."""

    temperature = 1.0  # lambda

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        first, last = self.temperatures
        self.temperature = first - (first - last) * (epoch - 1) / max(epochs - 1, 1)

    @property
    def temperatures(self):
        """Of the first and of the last epoch."""
        return self.options.snas_temperature, self.options.snas_temperature_end

    def draw_noise(self):
        """Gumbel noise, -log(-log(u)) of an even u, -log(u) being exponential."""
        return by_node(self, lambda alpha: -torch.empty_like(alpha).exponential_().log())

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, self.drawn, noise)

    def drawn(self, alpha, gumbel):
        return ((alpha.log_softmax(-1) + gumbel) / self.temperature).softmax(-1)


class Gdas(Snas):
    """GDAS (Dong and Yang, arXiv:1910.04465): one candidate is drawn on each edge, and runs alone."""

    @property
    def temperatures(self):
        return self.options.gdas_temperature, self.options.gdas_temperature_end

    @property
    def mixed_op(self):
        return DrawnMixedOp

    def forward(self, x):
        return WithZeroGradients.apply(super().forward(x), *self.weights())

    def drawn(self, alpha, gumbel):
        """One-hot; the gradient is that of the drawn candidate's weight in `Snas.drawn` (straight-through)."""
        soft = super().drawn(alpha, gumbel)
        return F.one_hot(soft.argmax(-1), soft.shape[-1]) * (1 + (soft - soft.detach()))


class DrawnMixedOp(MixedOp):
    """A mixture whose candidates of weight zero don't run, so that their BN sees no batch either."""

    def forward(self, x, weights):
        drawn = weights.detach().nonzero().flatten().tolist()
        return sum(weights[i] * self._ops[i](x) for i in drawn)


class WithZeroGradients(torch.autograd.Function):
    """The output; its gradient is zero with respect to all w, and so of those that did not run not None.

    In w's step these go on by momentum and decay, as those of weight zero do in a sum of all.
    """

    @staticmethod
    def forward(ctx, output, *weights):
        ctx.weights = weights
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        return grad, *map(torch.zeros_like, ctx.weights)


class DrNas:
    """DrNAS (Chen et al., arXiv:2006.10355): weights are drawn from Dirichlet(elu(alpha) + 1)."""

    def draw_noise(self):
        """Of each node's edges the drawn weights, and their derivative by the concentrations (pathwise)."""
        beta = concentrations(all_edges(self)).detach().requires_grad_()
        with torch.enable_grad():
            theta = Dirichlet(beta, validate_args=False).rsample()
            rows = [torch.autograd.grad(column.sum(), beta, retain_graph=True)[0] for column in theta.unbind(1)]
        sizes = [len(alpha) for alpha in (*self.alpha_normal, *self.alpha_reduce)]
        draws = list(zip(theta.detach().split(sizes), torch.stack(rows, 1).split(sizes)))
        return {"normal": draws[: self.n_nodes], "reduce": draws[self.n_nodes :]}

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, self.drawn, noise)

    def drawn(self, alpha, draw):
        theta, jacobian = draw
        beta = concentrations(alpha)
        zero = beta - beta.detach()
        return theta + (jacobian * zero.unsqueeze(1)).sum(-1)  # theta, with its derivative


class DrNasObjective:
    def alpha_objective(self, X, y):
        loss, strength = super().alpha_objective(X, y), self.options.drnas_kl_strength
        if strength == 0:
            return loss
        beta = concentrations(all_edges(self.net))
        now, start = (Dirichlet(b, validate_args=False) for b in (beta, torch.ones_like(beta)))
        return loss + strength * kl_divergence(now, start).sum()


def concentrations(alpha):
    """The parameters beta of Dirichlet distributions, 1 (all weights are as likely) where alpha is 0."""
    return F.elu(alpha) + 1


class SDarts:
    """SDARTS-RS (Chen and Hsieh, arXiv:2002.05283): in w's steps the weights of candidates are perturbed at random."""

    radius = 0.0  # epsilon

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        last = self.options.sdarts_radius
        first = min(0.03, last)
        self.radius = first + (last - first) * (epoch - 1) / epochs

    def draw_noise(self):
        if self.radius == 0:
            return None
        return by_node(self, lambda alpha: torch.empty_like(alpha).uniform_(-self.radius, self.radius))

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, perturbed, noise)


class SDartsArchitect:
    def unrolled_backward(self, *args):
        """As DARTS's, at the weights that are not perturbed."""
        noise, self.net.noise = self.net.noise, None
        try:
            return super().unrolled_backward(*args)
        finally:
            self.net.noise = noise


def perturbed(alpha, delta):
    """The softmax of alpha plus delta, made weights again: clipped to 0..1 and divided by their sum."""
    shifted = alpha.softmax(-1) + delta
    clipped = shifted.clamp(0, 1)
    strongest = F.one_hot(shifted.argmax(-1), shifted.shape[-1]).to(shifted.dtype)  # where all are clipped to zero
    clipped = torch.where(clipped.sum(-1, keepdim=True) > 0, clipped, strongest)
    return clipped / clipped.sum(-1, keepdim=True)


# name -> (class for the network, class for the architect), None where DARTS's stays as it is
VARIANTS = {
    "pc-darts": (PCDarts, None),
    "beta-darts": (BetaDarts, BetaDartsObjective),
    "darts-minus": (DartsMinus, None),
    "fair-darts": (FairDarts, FairDartsObjective),
    "gdas": (Gdas, None),
    "snas": (Snas, None),
    "drnas": (DrNas, DrNasObjective),
    "sdarts": (SDarts, SDartsArchitect),
}

# Variants replace these, and extend all else, so that a class that overrides them can't be combined with the variant.
REPLACED = {"how alphas become weights": "edge_weights", "the operation on an edge": "mixed_op"}


def compose(options, network, architect):
    """The classes of the network and the architect for a run with these options: those given, with its variants.

    Raises UserError where a variant would replace what a class of the user's has changed, in a script as in `examples`.
    """
    if options.variant is None:
        return network, architect
    for name in options.variant.split(","):
        for attribute in sorted(map(REPLACED.get, CHANGES[name] & REPLACED.keys())):
            if getattr(network, attribute) is not getattr(SearchCNN, attribute):
                raise UserError(f"--variant {name} replaces {attribute}, which {network.__name__} has overridden")
    # a variant that has its own way from alphas to weights stands behind those that change its weights
    names = sorted(options.variant.split(","), key=lambda name: "how alphas become weights" in CHANGES[name])
    changed = []
    for i, base in enumerate((network, architect)):
        parts = [VARIANTS[name][i] for name in names if VARIANTS[name][i] is not None]
        name = "".join(part.__name__ for part in parts) + base.__name__
        changed.append(type(name, (*parts, base), {"options": options}))
    return changed
