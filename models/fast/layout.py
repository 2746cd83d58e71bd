"""What the two ways of running a search cell's edges share: what runs in which order, and what the modules record.

A way, a subclass of `Layout`, says how the images of E edges lie in memory and how each step is done there.
"""

import itertools
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.fast.depthwise import every_second, pixels_read
from models.fast.modules import POOLS, geometry, is_standard_bn, is_standard_link, is_synced, links_of, signature
from models.ops import Identity, PoolBN, Zero
from models.sync_bn import batch_norm as synced_batch_norm


@dataclass
class Candidate:
    """One candidate on all edges that run together: its operation on each, and their weights of it, (edges,).

    kind: how it runs: `skip`, `zero`, `pool`, `chain`, or `separate`, each operation by its own forward.
    """

    ops: list
    weights: torch.Tensor
    kind: str

    def of_source(self, i, n):
        """The part of it on the n edges from the i-th source."""
        edges = slice(i * n, (i + 1) * n)
        return Candidate(self.ops[edges], self.weights[edges], self.kind)


@dataclass
class PendingChain:
    """A candidate's chains on E edges, as far as they have come.

    weights: (E,), the candidate's; steps: what is left to do, each the E edges' `Link`s, their kernels, (E, C, 1, k, k)
    or None, and their pointwise matrices, (E, C, K); images: what the next step convolves, as the layout has them.
    """

    weights: torch.Tensor
    steps: list
    images: object = None


@dataclass
class Product:
    """Pointwise convolutions on E edges, to be normalised: z, what they read, as the layout has it; M, (E, C, K)."""

    z: object
    M: torch.Tensor
    bns: list
    weights: torch.Tensor  # (E,), of the candidate
    activation: nn.Module | None = None  # that follows, but for the last of a chain


@dataclass
class Edges:
    """Edges that run together, from each of S sources to each of n targets: edge s * n + t is from s to t."""

    n: int
    candidates: list
    chains: list  # the `PendingChain`s of those candidates that are chains


class Layout:
    """A way of running the edges from some sources.

    A subclass has `mixed(states, edges, statistics)`: the weighted sum of the candidates' outputs for each target, as a
    list of tensors (N, C, h, w). states: the sources, (N, C, H, W); edges: an `Edges`, used up by this; statistics: a
    `RunningStatistics`.
    """

    folded_activations = ()  # those that `_depthwise` does itself

    def prepared(self, operations, weights):
        """The cell's `Edges`, all weights of chains stacked by one step.

        operations: of each group of edges that run together, operations[s][t]: the candidates from source s to target
        t; weights: of each, (S * n, candidates).
        """
        candidates = list(map(candidates_of, operations, weights))
        chains = _pending([[candidate for candidate in group if candidate.kind == "chain"] for group in candidates])
        return [Edges(len(ops[0]), *group) for ops, *group in zip(operations, candidates, chains)]

    def _without_weights(self, x, candidates, statistics):
        """The candidates that have no weights of their own, on all edges from x.

        Returns (weights, terms, total): what is still to be mixed, by weights (E, len(terms)), and what is done, edges
        first; None for weights or total where there is nothing.
        """
        columns, terms, total = [], [], None
        only_zeros = {candidate.kind for candidate in candidates} == {"zero"}
        for candidate in candidates:
            if candidate.kind == "skip":
                columns.append(candidate.weights)
                terms.append(x)
            elif candidate.kind == "pool":
                pooled = self._apply(candidate.ops[0][0], x)
                bns = [op[1] for op in candidate.ops]
                if bns[0].training:  # the statistics are the same for all edges of a source
                    columns.append(candidate.weights)
                    terms.append(self._batch_norm(pooled, bns, statistics))
                else:  # the recorded ones need not be
                    total = add(total, self._scaled(pooled, *recorded_scale(bns, candidate.weights)))
            elif candidate.kind == "separate" or only_zeros:
                total = add(total, self._separately(candidate.ops, x, candidate.weights))
        return torch.stack(columns, 1) if terms else None, terms, total

    def _add_chains(self, bases, inputs, chains, statistics):
        """bases plus the chains, weighted. inputs: an `Inputs`."""
        if not chains:
            return bases
        for chain in chains:
            link = chain.steps[0][0][0]
            chain.images = inputs.read_by(link, self._activation(link))
        last = []
        while chains:
            jobs = [(*chain.steps[0][:2], chain.images) for chain in chains if chain.steps[0][1] is not None]
            convolved = iter(self._depthwise(jobs))
            unfinished, inner = [], []
            for chain in chains:
                (links, kernels, M), *steps = chain.steps
                z = self._unconvolved(chain.images) if kernels is None else next(convolved)
                product = Product(z, M, [link.bn for link in links], chain.weights)
                if steps:
                    product.activation = self._activation(steps[0][0][0])
                    unfinished.append(PendingChain(chain.weights, steps))
                    inner.append(product)
                else:
                    last.append(product)
            for chain, outputs in zip(unfinished, self._activated(inner, statistics)):
                chain.images = outputs
            chains = unfinished
        return self._add_mixture(bases, last, statistics)

    def _activation(self, link):
        """What is still to be done before a link's `_depthwise`."""
        is_folded = link.depthwise is not None and type(link.activation) in self.folded_activations
        return nn.Identity() if is_folded else link.activation


class Inputs:
    """What chains start with: activations of the sources, repeated by `repeat` for the n edges of each."""

    def __init__(self, sources, n, repeat):
        self.sources, self.n, self.repeat, self.computed = sources, n, repeat, {}

    def read_by(self, link, activation):
        """What a chain with this first link convolves: all pixels, or those that it reads."""
        if link.depthwise is None:
            pixels = even_and_odd
        else:
            pixels = every_second if pixels_read(*geometry(link.depthwise))[0] else None
        kind = signature(activation), pixels
        if kind not in self.computed:
            activated = [activation(source) for source in self.sources]
            self.computed[kind] = self.repeat([pixels(x) for x in activated] if pixels else activated, self.n)
        return self.computed[kind]


class RunningStatistics:
    """Means and unbiased variances on their way to the modules' running statistics."""

    def __init__(self):
        self.bns, self.means, self.variances = [], [], []
        self.zeros = None  # not used yet

    def moments(self, n, like):
        """Two rows of n zeros, cut from a larger tensor."""
        if self.zeros is None or self.zeros.shape[1] < n:
            self.zeros = like.new_zeros(2, max(n, 8192))
        moments, self.zeros = self.zeros.split([n, self.zeros.shape[1] - n], 1)
        return moments

    def add(self, bns, means, variances):
        """means, variances: (..., C), each for as many of the bns in a row as there are for one."""
        if bns[0].track_running_stats:
            self.bns += bns
            for rows, moments in ((self.means, means), (self.variances, variances)):
                new = moments.flatten(0, -2).unbind()
                rows += [row for row in new for _ in range(len(bns) // len(new))]

    @torch.no_grad()
    def record(self):
        """Update them as the modules would: towards the batch's by `momentum`."""
        for momentum in {bn.momentum for bn in self.bns}:
            indices = [i for i, bn in enumerate(self.bns) if bn.momentum == momentum]
            bns = [self.bns[i] for i in indices]
            torch._foreach_lerp_([bn.running_mean for bn in bns], [self.means[i] for i in indices], momentum)
            torch._foreach_lerp_([bn.running_var for bn in bns], [self.variances[i] for i in indices], momentum)
            counts = [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None]
            if counts:
                torch._foreach_add_(counts, 1)


def candidates_of(operations, weights):
    """The `Candidate`s of some edges; see `Layout.prepared`."""
    columns = zip(*itertools.chain(*operations), strict=True)
    return [Candidate(list(ops), w, kind_of(ops)) for ops, w in zip(columns, weights.unbind(1), strict=True)]


def kind_of(ops):
    """How these operations, the same candidate on several edges, run; see `Candidate`."""
    signatures = [signature(op) for op in ops]
    if signatures[0] is None or signatures.count(signatures[0]) < len(signatures):
        return "separate"
    if signatures[0] not in _KINDS:
        _KINDS[signatures[0]] = _classify(ops[0])
    return _KINDS[signatures[0]]


_KINDS = {}  # signature -> kind


def _classify(op):
    if type(op) in (Identity, Zero):
        return "skip" if type(op) is Identity else "zero"
    if type(op) is PoolBN:
        is_standard = len(op) == 2 and type(op[0]) in POOLS and _is_without_weight(op[1])
        return "pool" if is_standard else "separate"
    links = links_of(op)
    is_chain = links and all(is_standard_link(link) and _is_without_weight(link.bn) for link in links)
    if not is_chain:
        logging.getLogger("darts").info(f"operations that the fused execution does not know run by themselves: {op}")
    return "chain" if is_chain else "separate"


def _is_without_weight(bn):
    """Whether this is BN as a search cell has it."""
    return is_standard_bn(bn) and bn.weight is None


def _pending(groups):
    """The `PendingChain`s of some groups of candidates, a list for each."""
    links = [[list(zip(*map(links_of, candidate.ops))) for candidate in group] for group in groups]
    tensors = [weights for group in links for steps in group for step in steps for weights in _weights(step)]
    stacks = iter(_Stacks.apply(list(map(len, tensors)), *itertools.chain(*tensors)) if tensors else [])

    def ready(step):
        if step[0].depthwise is None:
            return step, None, _block_diagonal(next(stacks).flatten(2), next(stacks).flatten(2))
        return step, next(stacks), next(stacks).flatten(2)

    return [
        [PendingChain(candidate.weights, list(map(ready, steps))) for candidate, steps in zip(*group)]
        for group in zip(groups, links)
    ]


def _weights(links):
    """Of one step on each edge: its depthwise kernels, if any, and its pointwise convolutions' weights."""
    pointwise = [list(weights) for weights in zip(*([conv.weight for conv in link.pointwise] for link in links))]
    return pointwise if links[0].depthwise is None else [[link.depthwise.weight for link in links], *pointwise]


def _block_diagonal(A, B):
    """Matrices with A, (E, C, K), above and left of B, (E, D, L), and zeros elsewhere: (E, C + D, K + L)."""
    return torch.cat([F.pad(A, (0, B.shape[2])), F.pad(B, (A.shape[2], 0))], 1)


class _Stacks(torch.autograd.Function):
    """Stacks of the first tensors, of the next ones, ...: a step and its gradient where PyTorch's would be one for each
    tensor."""

    @staticmethod
    def forward(ctx, sizes, *tensors):
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        flat, ends = torch.cat([tensor.flatten() for tensor in tensors]), list(itertools.accumulate(sizes))
        firsts = [tensors[end - size] for size, end in zip(sizes, ends)]
        parts = flat.split([size * first.numel() for size, first in zip(sizes, firsts)])
        return tuple(part.view(size, *first.shape) for part, size, first in zip(parts, sizes, firsts))

    @staticmethod
    def backward(ctx, *grads):
        return None, *itertools.chain(*[[None] * n if g is None else g.unbind() for n, g in zip(ctx.sizes, grads)])


def even_and_odd(x):
    """What FactorizedReduce's two convolutions read: even and odd pixels, as channels side by side."""
    H, W = x.shape[-2:]
    odd = every_second(x, 1)
    if H % 2 or W % 2:
        odd = F.pad(odd, (0, W % 2, 0, H % 2))
    return torch.cat([every_second(x), odd], -3)


def batch_norm(images, bns, scale, statistics):
    """PyTorch's BN by the statistics of the batch, times a scale (E * C,), of images (N, E * C, ...) of E edges.

    Means and variances go to `statistics`, if the modules record any.
    """
    shape = 2, -1, bns[0].num_features
    if is_synced(bns[0]):
        y, *moments = synced_batch_norm(images, scale, None, bns[0].eps)
        statistics.add(bns, *(values.to(bns[0].running_mean.dtype).view(shape[1:]) for values in moments))
        return y
    if not bns[0].track_running_stats:
        return F.batch_norm(images, None, None, scale, None, True, 1.0, bns[0].eps)
    moments = statistics.moments(images.shape[1], like=bns[0].running_mean)
    y = F.batch_norm(images, *moments, scale, None, True, 1.0, bns[0].eps)
    statistics.add(bns, *moments.unflatten(1, shape[1:]))
    return y


def recorded_scale(bns, weights=None):
    """BN by running statistics, times weights (BN,), as y = factor * u + shift: two tensors (BN, C)."""
    mean = torch.stack([bn.running_mean for bn in bns])
    factor = torch.stack([(bn.running_var + bn.eps).rsqrt() for bn in bns])
    factor = factor if weights is None else factor * weights.unsqueeze(1)
    return factor, -factor * mean


def alike(products):
    """Products in runs whose matrices have one shape, BN and activations of one kind.

    Yields (zs, M, bns, list of weights, activation) of each run.
    """

    def kind(product):
        bn, activation = product.bns[0], product.activation
        return (
            product.M.shape,
            type(bn),
            bn.eps,
            bn.training,
            bn.track_running_stats,
            activation and signature(activation),
        )

    for _, group in itertools.groupby(products, kind):
        run = list(group)
        zs, weights = [product.z for product in run], [product.weights for product in run]
        M, bns = torch.cat([product.M for product in run]), [bn for product in run for bn in product.bns]
        yield zs, M, bns, weights, run[0].activation


def add(total, term):
    """total + term, where total is None at the start."""
    return term if total is None else total + term
