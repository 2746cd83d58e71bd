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


@dataclass(eq=False)  # a key of dictionaries
class Candidate:
    """One candidate on all E edges that run together: its operation on each, and their weights of it, (E,).

    kind: how it runs: `skip`, `zero`, `pool`, `chain`, or `separate`, each operation by its own forward. Of a chain,
    links[t]: the edges' `Link`s of step t; kernels[t]: (E, C, 1, k, k), or None without depthwise convolutions.
    """

    ops: list
    weights: torch.Tensor
    kind: str
    links: list | None = None
    kernels: list | None = None

    def is_shared(self):
        """Whether all edges from a source have the same output. BN by recorded statistics can differ."""
        return self.kind == "skip" or (self.kind == "pool" and self.ops[0][1].training)

    def of_source(self, i, n):
        """The part of it on the n edges from the i-th source."""
        edges = slice(i * n, (i + 1) * n)
        return Candidate(self.ops[edges], self.weights[edges], self.kind)


@dataclass
class Product:
    """Pointwise convolutions of several chains, all followed by the same kinds of BN and activation, as one product.

    links: of all edges of each chain in turn; activation: what follows, None after a chain's last step; M: the links'
    matrices, (links, C, K); weights: after a last step, the candidates', (links, 1), or (links, at least C) by channel.
    """

    chains: list
    links: list
    activation: nn.Module | None
    M: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def bns(self):
        return [link.bn for link in self.links]


@dataclass
class Edges:
    """Edges that run together, from each of S sources to each of n targets: edge s * n + t is from s to t.

    products[t]: the `Product`s of step t of the chains that have another; products[-1]: of the last steps of all
    chains; shared_weights: of the candidates that are shared, (candidates * S * n, 1).
    """

    n: int
    candidates: list
    chains: list
    products: list
    shared_weights: torch.Tensor | None = None


class Layout:
    """A way of running the edges from some sources.

    A subclass has `mixed(states, edges, statistics)`: the weighted sum of the candidates' outputs for each target, as a
    list of tensors (N, C, h, w). states: the sources, (N, C, H, W); edges: an `Edges`; statistics: a
    `RunningStatistics`.
    """

    folded_activations = ()  # those that `_depthwise` does itself
    weights_by_channel = False  # whether the weights of chains are repeated for each channel

    def prepared(self, operations, weights):
        """The cell's `Edges`; all that needs only weights is done here, by one step for the cell.

        operations: of each group of edges that run together, operations[s][t]: the candidates from source s to target
        t; weights: (candidates, edges), the edges of the first group, source by source, then those of the next, ...
        """
        sizes = [len(ops) * len(ops[0]) for ops in operations]
        columns = weights.flatten().split(sizes * len(weights))
        groups = [self._edges(ops, columns[g :: len(sizes)]) for g, ops in enumerate(operations)]
        _stack_parameters(groups)
        shared = [[candidate for candidate in edges.candidates if candidate.is_shared()] for edges in groups]
        for edges, joined in zip(groups, _joined_weights(shared)):
            edges.shared_weights = joined
        products = [product for edges in groups for product in edges.products[-1]]
        C = max((product.M.shape[1] for product in products), default=1) if self.weights_by_channel else 1
        for product, joined in zip(products, _joined_weights([product.chains for product in products], C)):
            product.weights = joined
        return groups

    def _edges(self, operations, weights):
        """The `Edges` of a group; weights: of each candidate, (edges,)."""
        candidates = candidates_of(operations, weights)
        chains = [candidate for candidate in candidates if candidate.kind == "chain"]
        for chain in chains:
            chain.links = list(zip(*map(links_of, chain.ops)))
        steps = [[] for _ in range(max((len(chain.links) for chain in chains), default=1))]
        for chain in chains:
            for inner, links, (following, *_) in zip(steps, chain.links, chain.links[1:]):
                inner.append((chain, links, self._activation(following)))
        steps[-1] = [(chain, chain.links[-1], None) for chain in sorted(chains, key=lambda chain: len(chain.links))]
        return Edges(len(operations[0]), candidates, chains, list(map(_products, steps)))

    def _without_weights(self, x, candidates, statistics):
        """The candidates that have no weights of their own, on all edges from x.

        Returns (shared, total): the outputs of those that are shared, still to be weighted, and the weighted sum of the
        others, edges first; None without others.
        """
        shared, total = [], None
        only_zeros = {candidate.kind for candidate in candidates} == {"zero"}
        for candidate in candidates:
            if candidate.kind == "skip":
                shared.append(x)
            elif candidate.kind == "pool":
                pooled = self._apply(candidate.ops[0][0], x)
                bns = [op[1] for op in candidate.ops]
                if candidate.is_shared():
                    shared.append(self._batch_norm(pooled, bns, statistics))
                else:
                    scale = recorded_scale(bns, candidate.weights.unsqueeze(1))
                    total = add(total, self._scaled(pooled, *scale))
            elif candidate.kind == "separate" or only_zeros:
                total = add(total, self._separately(candidate.ops, x, candidate.weights))
        return shared, total

    def _add_chains(self, bases, inputs, edges, statistics):
        """bases plus the chains, weighted. inputs: an `Inputs`."""
        images = {}
        for chain in edges.chains:
            link = chain.links[0][0]
            images[chain] = inputs.read_by(link, self._activation(link))
        for t, products in enumerate(edges.products):
            chains = [chain for chain in edges.chains if chain.links[t:]]
            jobs = [(chain.links[t], chain.kernels[t], images[chain]) for chain in chains]
            images.update(zip(chains, self._depthwise(jobs)))
            for product in products:
                zs = [images[chain] for chain in product.chains]
                if product.activation is None:
                    bases = self._add_mixture(bases, product, zs, edges.n, statistics)
                else:
                    images.update(zip(product.chains, self._activated(product, zs, statistics)))
        return bases

    def _activation(self, link):
        """What is still to be done before a link's `_depthwise`."""
        is_folded = link.depthwise is not None and type(link.activation) in self.folded_activations
        return _IDENTITY if is_folded else link.activation


_IDENTITY = nn.Identity()


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
    """The `Candidate`s of some edges; see `Layout._edges`."""
    columns = zip(*itertools.chain(*operations), strict=True)
    return [Candidate(list(ops), w, kind_of(ops)) for ops, w in zip(columns, weights, strict=True)]


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


def _products(steps):
    """The `Product`s of steps, each a chain, its links and the activation that follows."""

    def kind(step):
        _, (link, *_), activation = step
        shapes = [conv.weight.shape for conv in link.pointwise]
        return shapes, signature(link.bn), activation and signature(activation)

    alike = [list(zip(*group)) for _, group in itertools.groupby(steps, kind)]
    return [Product(chains, list(itertools.chain(*links)), activation) for chains, links, (activation, *_) in alike]


def _stack_parameters(groups):
    """Set the kernels of all chains and the matrices of all products, by one step."""
    chains = [chain for edges in groups for chain in edges.chains]
    products = [product for edges in groups for product in itertools.chain(*edges.products)]
    steps = [links for chain in chains for links in chain.links if links[0].depthwise is not None]
    tensors = [[link.depthwise.weight for link in links] for links in steps]
    for product in products:
        tensors += zip(*([conv.weight for conv in link.pointwise] for link in product.links))
    stacks = iter(_Stacks.apply(list(map(len, tensors)), *itertools.chain(*tensors)) if tensors else [])
    for chain in chains:
        chain.kernels = [None if links[0].depthwise is None else next(stacks) for links in chain.links]
    for product in products:
        M, *second = [next(stacks).flatten(2) for _ in product.links[0].pointwise]
        product.M = _block_diagonal(M, *second) if second else M


def _joined_weights(lists, C=1):
    """The weights of each list of candidates, repeated for C channels, by one step: (weights, C) for each list."""
    weights = [[candidate.weights for candidate in candidates] for candidates in lists]
    joined = torch.cat(list(itertools.chain(*weights))) if any(weights) else torch.zeros(0)
    return joined.unsqueeze(1).expand(-1, C).contiguous().split([sum(map(len, part)) for part in weights])


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
    """BN by running statistics, times weights (BN, 1 or C), as y = factor * u + shift: two tensors (BN, C)."""
    mean = torch.stack([bn.running_mean for bn in bns])
    factor = torch.stack([(bn.running_var + bn.eps).rsqrt() for bn in bns])
    factor = factor if weights is None else factor * weights
    return factor, -factor * mean


def add(total, term):
    """total + term, where total is None at the start."""
    return term if total is None else total + term
