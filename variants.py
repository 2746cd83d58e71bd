"""The published variants of DARTS: each is what it changes of `SearchCNN` and `Architect`, and inherits all else.

python search.py --variant pc-darts
python search.py --variant pc-darts,beta-darts

A variant is a class of the network, named in `VARIANTS`. Its fields are its options on the command line, `changes` is
what it changes, and `architect` is its class of the architect, if it has one. `compose` puts the variants of a run in
front of the classes that they change, so that `super()` is DARTS or the next variant. docs/variants.md says what each
is for.
"""

import dataclasses
import enum
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

from architect import Architect
from command_line.errors import UserError, warn
from models.ops import MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN
from run.options import natural, nonnegative, option, positive, positive_int, probability


class Change(enum.Enum):
    """What a variant can change, by the name of the method. Two variants that change the same can't be combined."""

    edge_weights = "how alphas become weights"
    mixed_op = "the operation on an edge"
    genotype = "how edges are ranked"
    alpha_objective = "what alpha descends"


class NetworkVariant(SearchCNN):
    """The base of all variants. An annotated attribute, made by `option`, is an option of the command line."""

    changes: tuple[Change, ...] = ()
    architect = None  # a subclass of `Architect` to put in front of the run's architect; None: that is unchanged

    def __init_subclass__(cls):
        dataclasses.dataclass(cls, init=False, repr=False, eq=False)


def by_node(net, function, noise=None):
    """Apply a function to each node's alphas, a tensor (edges, candidates), and return what `edge_weights` returns.

    `by_node(net, torch.sigmoid)` is {"normal": [sigmoid(alpha_normal[0]), ...], "reduce": [...]}. With noise, which
    has the same structure, it is function(alpha, noise) of each node.
    """
    if noise is None:
        return {kind: list(map(function, alphas)) for kind, alphas in net.alpha.items()}
    return {kind: list(map(function, alphas, noise[kind])) for kind, alphas in net.alpha.items()}


def all_edges(net):
    """The alphas of all edges of all kinds of cell, (edges, candidates)."""
    return torch.cat([alpha for alphas in net.alpha.values() for alpha in alphas])


class PCDarts(NetworkVariant):
    """PC-DARTS (Xu et al., arXiv:1907.05737): 1/K of the channels are searched, edges are normalised, alphas wait.

    `beta_normal` and `beta_reduce` hold a number for each edge of a node, which learn as the alphas do.
    """

    changes = (Change.mixed_op, Change.genotype)

    pc_share: int = option(4, "1/N of the channels are searched", positive_int)
    pc_edge_normalisation: str = option("on", "whether a node's edges are weighed too", choices=("on", "off"))
    pc_warm_up: int = option(15, "number of epochs before alphas learn", natural)

    def __init__(self, C_in, C, *args, **kwargs):
        if C % self.pc_share:
            raise UserError(f"--pc-share {self.pc_share} must divide --init-channels {C}")
        super().__init__(C_in, C, *args, **kwargs)
        if self.pc_edge_normalisation == "on":
            for kind, alphas in self.alpha.items():
                betas = (1e-3 * torch.randn(len(edges)) for edges in alphas)
                self.add_module(f"beta_{kind}", nn.ParameterList(map(nn.Parameter, betas)))

    @property
    def beta(self):
        """The weights of edges before their softmax, for each kind of cell; {} without edge normalisation."""
        if self.pc_edge_normalisation == "off":
            return {}
        return {kind: getattr(self, f"beta_{kind}") for kind in self.space.kinds}

    @property
    def mixed_op(self):
        return functools.partial(PartialMixedOp, K=self.pc_share)

    def edge_weights(self, noise=None):
        weights = super().edge_weights(noise)
        if self.pc_edge_normalisation == "off":
            return weights
        return {
            kind: [w * beta.softmax(0).unsqueeze(1) for w, beta in zip(weights[kind], betas)]
            for kind, betas in self.beta.items()
        }

    def alphas(self):
        yield from super().alphas()
        for betas in self.beta.values():
            yield from betas

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.alphas_learn = epoch > self.pc_warm_up
        if epoch == 1 and self.pc_warm_up >= epochs:
            warn(f"alphas learn after --pc-warm-up {self.pc_warm_up} epochs, and so never in {epochs}")


class BetaDartsObjective(Architect):
    def alpha_objective(self, X, y):
        net, loss = self.net, super().alpha_objective(X, y)
        if net.penalty == 0:
            return loss
        return loss + net.penalty * all_edges(net).logsumexp(1).mean()


class BetaDarts(NetworkVariant):
    """beta-DARTS (Ye et al., arXiv:2203.01665): a penalty on large alphas, which rises in the course of the search."""

    changes = (Change.alpha_objective,)
    architect = BetaDartsObjective

    beta_strength: float = option(50.0, "weight of the penalty that it approaches, linearly from 0", nonnegative)

    penalty = 0.0  # lambda

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.penalty = self.beta_strength * (epoch - 1) / epochs


class DartsMinus(NetworkVariant):
    """DARTS- (Chu et al., arXiv:2009.01027): an auxiliary skip connection on every edge, which fades out.

    It comes after the candidates in `_ops` and is not one of them, so the genotype can't contain it.
    """

    changes = (Change.mixed_op,)

    minus_strength: float = option(1.0, "weight of the auxiliary skip connections at the start", nonnegative)
    minus_epochs: int | None = option(
        None, "number of epochs in which that weight falls to 0 (default: all of the run)", positive_int
    )

    auxiliary_weight = 0.0  # beta

    @property
    def mixed_op(self):
        if self.minus_strength == 0:
            return super().mixed_op
        return lambda C, stride, primitives: MixedOp(C, stride, [*primitives, "skip_connect"])

    def operation_weights(self, noise=None):
        weights = super().operation_weights(noise)
        if self.minus_strength == 0:
            return weights
        return {kind: [F.pad(w, (0, 1), value=self.auxiliary_weight) for w in nodes] for kind, nodes in weights.items()}

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        self.auxiliary_weight = self.minus_strength * max(0, 1 - (epoch - 1) / (self.minus_epochs or epochs))


class FairDartsObjective(Architect):
    def alpha_objective(self, X, y):
        loss, strength = super().alpha_objective(X, y), self.net.fair_strength
        if strength == 0:
            return loss
        return loss - strength * (all_edges(self.net).sigmoid() - 0.5).square().mean()  # the zero-one loss


class FairDarts(NetworkVariant):
    """Fair DARTS (Chu et al., arXiv:1911.12126): the sigmoid of alpha, so that candidates do not compete."""

    changes = (Change.edge_weights, Change.genotype, Change.alpha_objective)
    architect = FairDartsObjective

    fair_strength: float = option(10.0, "weight of the zero-one loss", nonnegative)
    fair_threshold: float = option(0.85, "weight that an operation needs to enter the genotype", probability)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.space.chooses_edges:
            raise UserError(
                f"--variant fair-darts needs edges to choose; in --space {self.space.name} a node keeps all"
            )

    def edge_weights(self, noise=None):
        return by_node(self, torch.sigmoid)

    def genotype(self, *args, **kwargs):
        """Those of DARTS's k edges whose operation reaches the threshold, or the strongest if none does."""
        genotype, weights = super().genotype(*args, **kwargs), self.edge_weights()
        cells = {kind: list(map(self._certain, getattr(genotype, kind), weights[kind])) for kind in weights}
        return genotype._replace(**cells)

    def _certain(self, node, weights):
        strengths = [weights[source, self.primitives.index(op)] for op, source in node]
        return [edge for edge, w in zip(node, strengths) if w >= self.fair_threshold] or node[:1]


class Concrete(NetworkVariant):
    """Weights are drawn from a concrete distribution, whose temperature falls linearly from epoch to epoch."""

    changes = (Change.edge_weights,)

    temperatures = (1.0, 1.0)  # in the first epoch and in the last
    temperature = 1.0  # in this epoch

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        first, last = self.temperatures
        self.temperature = first - (first - last) * (epoch - 1) / max(epochs - 1, 1)

    def draw_noise(self):
        """Gumbel noise: -log(-log(u)) for a uniform u, of which -log(u) is exponential."""
        return by_node(self, lambda alpha: -torch.empty_like(alpha).exponential_().log())

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, self.drawn, noise)

    def drawn(self, alpha, gumbel):
        return ((alpha.log_softmax(-1) + gumbel) / self.temperature).softmax(-1)


class Snas(Concrete):
    """SNAS (Xie et al., arXiv:1812.09926): the weights of a step are drawn, and become one-hot as they cool."""

    snas_temperature: float = option(1.0, "temperature of the draws in the first epoch", positive)
    snas_temperature_end: float = option(0.03, "temperature in the last epoch, linear in between", positive)

    @property
    def temperatures(self):
        return self.snas_temperature, self.snas_temperature_end


class Gdas(Concrete):
    """GDAS (Dong and Yang, arXiv:1910.04465): one candidate is drawn on each edge, and runs alone."""

    changes = (Change.edge_weights, Change.mixed_op)

    gdas_temperature: float = option(10.0, "temperature of the draws in the first epoch", positive)
    gdas_temperature_end: float = option(0.1, "temperature in the last epoch, linear in between", positive)
    gdas_zeros: str = option(
        "off",
        "whether alphas of candidates that were not drawn get a gradient too, by zeros added to the edge's output",
        choices=("on", "off"),
    )

    @property
    def temperatures(self):
        return self.gdas_temperature, self.gdas_temperature_end

    @property
    def mixed_op(self):
        return functools.partial(DrawnMixedOp, zeros=self.gdas_zeros == "on")

    def forward(self, x):
        return WithZeroGradients.apply(super().forward(x), *self.weights())

    def drawn(self, alpha, gumbel):
        """One-hot; the gradients are those of the weights in `Concrete.drawn` (straight-through)."""
        soft = super().drawn(alpha, gumbel)
        return F.one_hot(soft.argmax(-1), soft.shape[-1]) + (soft - soft.detach())


class DrawnMixedOp(MixedOp):
    """A mixture whose candidates of weight zero don't run, so that their BN sees no batch either.

    zeros: whether the weights of those are added, as the authors' code does in NAS-Bench-201's space, not in DARTS's.
    """

    def __init__(self, C, stride, primitives, zeros=False):
        super().__init__(C, stride, primitives)
        self.zeros = zeros

    def forward(self, x, weights):
        drawn = weights.detach().nonzero().flatten().tolist()
        output = sum(weights[i] * self._ops[i](x) for i in drawn)
        return output + (weights.sum() - weights[drawn].sum()) if self.zeros else output


class WithZeroGradients(torch.autograd.Function):
    """Returns the output, and gives every w a gradient of zero instead of none.

    So momentum and decay still act on operations that did not run, as in a sum with weights of zero.
    """

    @staticmethod
    def forward(ctx, output, *weights):
        ctx.weights = weights
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        return grad, *map(torch.zeros_like, ctx.weights)


class DrNasObjective(Architect):
    def alpha_objective(self, X, y):
        loss, strength = super().alpha_objective(X, y), self.net.drnas_kl_strength
        if strength == 0:
            return loss
        beta = concentrations(all_edges(self.net))
        now, start = (Dirichlet(b, validate_args=False) for b in (beta, torch.ones_like(beta)))
        return loss + strength * kl_divergence(now, start).sum()


class DrNas(NetworkVariant):
    """DrNAS (Chen et al., arXiv:2006.10355): weights are drawn from Dirichlet(elu(alpha) + 1)."""

    changes = (Change.edge_weights, Change.alpha_objective)
    architect = DrNasObjective

    drnas_kl_strength: float = option(
        0.0, "weight of the KL divergence from Dirichlet(1); 0: only --alpha-weight-decay holds alpha back", nonnegative
    )

    def draw_noise(self):
        """For each node the weights drawn for its edges, and their pathwise derivatives with respect to the
        concentrations.

        They are drawn here and not in `edge_weights`, so that all passes of a step share one draw.
        """
        beta = concentrations(all_edges(self)).detach().requires_grad_()
        with torch.enable_grad():
            theta = Dirichlet(beta, validate_args=False).rsample()
            rows = [torch.autograd.grad(column.sum(), beta, retain_graph=True)[0] for column in theta.unbind(1)]
        sizes = [len(edges) for alphas in self.alpha.values() for edges in alphas]
        draws = zip(theta.detach().split(sizes), torch.stack(rows, 1).split(sizes))
        return {kind: [next(draws) for _ in alphas] for kind, alphas in self.alpha.items()}

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, self.drawn, noise)

    def drawn(self, alpha, draw):
        theta, jacobian = draw
        beta = concentrations(alpha)
        zero = beta - beta.detach()
        return theta + (jacobian * zero.unsqueeze(1)).sum(-1)  # theta, with the derivative that the draw has computed


def concentrations(alpha):
    """The parameters beta of the Dirichlet distributions; if alpha is 0 they are 1, and all weights equally likely."""
    return F.elu(alpha) + 1


class SDartsArchitect(Architect):
    def unrolled_backward(self, *args):
        """The gradient of DARTS, at the weights that are not perturbed."""
        noise, self.net.noise = self.net.noise, None
        try:
            return super().unrolled_backward(*args)
        finally:
            self.net.noise = noise


class SDarts(NetworkVariant):
    """SDARTS-RS (Chen and Hsieh, arXiv:2002.05283): in w's steps the weights of candidates are perturbed at random."""

    changes = (Change.edge_weights,)
    architect = SDartsArchitect

    sdarts_radius: float = option(0.3, "radius, grown from 0.03, within which weights are perturbed", nonnegative)

    radius = 0.0  # epsilon

    def begin_epoch(self, epoch, epochs):
        super().begin_epoch(epoch, epochs)
        last = self.sdarts_radius
        first = min(0.03, last)
        self.radius = first + (last - first) * (epoch - 1) / epochs

    def draw_noise(self):
        if self.radius == 0:
            return None
        return by_node(self, lambda alpha: torch.empty_like(alpha).uniform_(-self.radius, self.radius))

    def edge_weights(self, noise=None):
        return super().edge_weights() if noise is None else by_node(self, perturbed, noise)


def perturbed(alpha, delta):
    """The softmax of alpha plus delta, made weights again: clipped to 0..1 and divided by their sum."""
    shifted = alpha.softmax(-1) + delta
    clipped = shifted.clamp(0, 1)
    strongest = F.one_hot(shifted.argmax(-1), shifted.shape[-1]).to(shifted.dtype)  # where all are clipped to zero
    clipped = torch.where(clipped.sum(-1, keepdim=True) > 0, clipped, strongest)
    return clipped / clipped.sum(-1, keepdim=True)


VARIANTS = {
    "pc-darts": PCDarts,
    "beta-darts": BetaDarts,
    "darts-minus": DartsMinus,
    "fair-darts": FairDarts,
    "gdas": Gdas,
    "snas": Snas,
    "drnas": DrNas,
    "sdarts": SDarts,
}


def named(text: str) -> dict[str, type[NetworkVariant]]:
    """name -> class of the variants in a text such as "pc-darts,drnas".

    Raises UserError if a name is unknown, or is there twice, or two variants change the same thing.
    """
    variants, changed_by = {}, {}
    for name in text.split(","):
        if name not in VARIANTS:
            raise UserError(f"--variant: unknown variant {name!r}; give some of {', '.join(VARIANTS)}, with commas")
        if name in variants:
            raise UserError(f"--variant {text} names a variant twice")
        variants[name] = VARIANTS[name]
        for change in VARIANTS[name].changes:
            if change in changed_by:
                raise UserError(f"{changed_by[change]} and {name} can't be combined: both change {change.value}")
            changed_by[change] = name
    return variants


def compose(options, network: type[SearchCNN], architect: type[Architect]) -> tuple[type[SearchCNN], type[Architect]]:
    """The classes of the network and the architect for a run with these options: those given, extended by its variants.

    A variant that replaces the way from alphas to weights comes after those that extend it, so that their `super()`
    finds it. For `--variant drnas,pc-darts` the orders of inheritance are

        PCDartsDrNasSearchCNN, PCDarts, DrNas, NetworkVariant, SearchCNN
        DrNasObjectiveArchitect, DrNasObjective, Architect

    Raises UserError if a variant would replace what a class of a user's script has overridden.
    """
    if options.variant is None:
        return network, architect
    variants = named(options.variant)
    for name, variant in variants.items():
        for change in (Change.edge_weights, Change.mixed_op):  # variants replace these two, and extend the rest
            if change in variant.changes and getattr(network, change.name) is not getattr(SearchCNN, change.name):
                raise UserError(f"--variant {name} replaces {change.name}, which {network.__name__} has overridden")
    ordered = sorted(variants.values(), key=lambda variant: Change.edge_weights in variant.changes)
    numbers = {field.name: getattr(options, field.name) for variant in ordered for field in dataclasses.fields(variant)}
    architects = [variant.architect for variant in ordered if variant.architect is not None]
    return subclass([*ordered, network], numbers), subclass([*architects, architect], {})


def subclass(bases, attributes):
    """A class with these bases, in this order, and a name that lists them."""
    return type("".join(base.__name__ for base in bases), tuple(bases), attributes)
