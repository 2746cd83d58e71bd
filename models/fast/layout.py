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


class Layout:
    """A way of running the edges from some sources."""

    folded_activations = ()  # those that `_depthwise` does itself

    def mixed(self, states, edges, weights, statistics):
        """The weighted sum of the candidates' outputs for each target: a list of tensors (N, C, h, w).

        states: S sources, (N, C, H, W); edges[s][t]: the candidate operations from state s to target t; weights[s]:
        (targets, candidates); statistics: a `RunningStatistics`.
        """
        raise NotImplementedError

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
                outputs = self._separately(candidate.ops, x)
                total = add(total, outputs * candidate.weights[:, None, None, None, None])
        return torch.stack(columns, 1) if terms else None, terms, total

    def _add_chains(self, bases, inputs, candidates, statistics):
        """bases plus the candidates that are chains, weighted. inputs: an `Inputs`."""
        chains = _pending([candidate for candidate in candidates if candidate.kind == "chain"])
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
                    unfinished.append(PendingChain(chain.weights, steps))
                    inner.append(product)
                else:
                    last.append(product)
            for chain, outputs in zip(unfinished, self._normalised(inner, statistics)):
                activation = self._activation(chain.steps[0][0][0])
                chain.images = [activation(output) for output in outputs]
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


def candidates_of(edges, weights):
    """The `Candidate`s on edges[source][target], each a list of operations; see `Layout.mixed`."""
    columns = (torch.cat(weights) if len(weights) > 1 else weights[0]).unbind(1)
    operations = zip(*itertools.chain(*edges), strict=True)
    return [Candidate(list(ops), column, kind_of(ops)) for ops, column in zip(operations, columns, strict=True)]


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
        return "pool" if type(op[0]) in POOLS and _is_without_weight(op[1]) else "separate"
    links = links_of(op)
    is_chain = links and all(is_standard_link(link) and _is_without_weight(link.bn) for link in links)
    if not is_chain:
        logging.getLogger("darts").info(f"operations that the fused execution does not know run by themselves: {op}")
    return "chain" if is_chain else "separate"


def _is_without_weight(bn):
    """Whether this is BN as a search cell has it."""
    return is_standard_bn(bn) and bn.weight is None


def _pending(candidates):
    """The `PendingChain`s of some candidates, all their weights stacked by one step."""
    links = [list(zip(*map(links_of, candidate.ops))) for candidate in candidates]  # [candidate][step][edge]
    groups = [group for steps in links for step in steps for group in _weights(step)]
    stacks = iter(_stacked(groups))
    chains = []
    for candidate, steps in zip(candidates, links):
        ready = []
        for step in steps:
            kernels = None if step[0].depthwise is None else next(stacks)
            ready.append((step, kernels, next(stacks).flatten(2)))
        chains.append(PendingChain(candidate.weights, ready))
    return chains


def _weights(links):
    """Of one step on each edge: its depthwise kernels, if any, and its pointwise matrices, (C, K, ...)."""
    if links[0].depthwise is None:
        return [[torch.block_diag(*(conv.weight.flatten(1) for conv in link.pointwise)) for link in links]]
    return [[link.depthwise.weight for link in links], [link.pointwise[0].weight for link in links]]


def _stacked(groups):
    """A stack of each group of tensors of one shape, by one concatenation of all."""
    if all(len(group) == 1 for group in groups):
        return [group[0].unsqueeze(0) for group in groups]
    return _Stacks.apply([len(group) for group in groups], *itertools.chain(*groups))


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
    """What FactorizedReduce's two convolutions read: even and odd pixels, as channels (dimension 1) side by side."""
    H, W = x.shape[-2:]
    odd = every_second(x, 1)
    if H % 2 or W % 2:
        odd = F.pad(odd, (0, W % 2, 0, H % 2))
    return torch.cat([every_second(x), odd], 1)


def batch_norm(images, bns, scale):
    """PyTorch's BN by the statistics of the batch, times a scale (C,): the output, and mean and variance (2, C)."""
    moments = images.new_zeros(2, images.shape[1], dtype=bns[0].running_mean.dtype)
    if not is_synced(bns[0]):
        return F.batch_norm(images, *moments, scale, None, True, 1.0, bns[0].eps), moments
    y, *statistics = synced_batch_norm(images, scale, None, bns[0].eps)
    torch._foreach_copy_(list(moments), statistics)
    return y, moments


def recorded_scale(bns, weights=None):
    """BN by running statistics, times weights (BN,), as y = factor * u + shift: two tensors (BN, C)."""
    mean = torch.stack([bn.running_mean for bn in bns])
    factor = torch.stack([(bn.running_var + bn.eps).rsqrt() for bn in bns])
    factor = factor if weights is None else factor * weights.unsqueeze(1)
    return factor, -factor * mean


def alike(products):
    """Products in runs whose matrices have one shape and BN of one kind: (zs, M, bns, list of weights) of each run."""

    def kind(product):
        bn = product.bns[0]
        return product.M.shape, type(bn), bn.eps, bn.training, bn.track_running_stats

    for _, group in itertools.groupby(products, kind):
        run = list(group)
        zs, weights = [product.z for product in run], [product.weights for product in run]
        yield zs, torch.cat([product.M for product in run]), [bn for product in run for bn in product.bns], weights


def add(total, term):
    """total + term, where total is None at the start."""
    return term if total is None else total + term
