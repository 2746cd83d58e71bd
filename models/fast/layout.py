"""What the two layouts share: which operations of a search cell run together, in which order, and what BN records.

A layout, a subclass of `Layout`, says how the images of E edges lie in memory and how each step is computed on them.
"""

import functools
import itertools
import logging
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from models.fast.depthwise import dense_gradient
from models.fast.modules import POOLS, Link, is_standard_bn, is_standard_link, is_synced, links_of, signature
from models.ops import Identity, PoolBN, Zero
from models.sync_bn import batch_norm as synced_batch_norm


@dataclass(eq=False)  # so that it can be a key of a dictionary
class Candidate:
    """One candidate on all E edges of a group: the operation on each edge, and its weights, (E,).

    kind: how it runs: `skip`, `zero`, `pool`, `chain`, or `separate` (each operation by its own `forward`). Only for a
    chain: links[t], the edges' `Link`s of step t; kernels[t], their depthwise kernels as one tensor (E, C, 1, k, k), or
    None if the step has none.
    """

    ops: list[nn.Module]
    weights: torch.Tensor
    kind: str
    links: list[tuple[Link, ...]] = field(default_factory=list)
    kernels: list[torch.Tensor | None] = field(default_factory=list)

    def from_source(self, s: int, n_targets: int) -> "Candidate":
        """This candidate on the edges from source s alone."""
        edges = slice(s * n_targets, (s + 1) * n_targets)
        return Candidate(self.ops[edges], self.weights[edges], self.kind)


@dataclass
class Product:
    """Pointwise convolutions of one or several chains as one matrix product, with the BN that follows.

    links: of all edges of the first chain, then of the second, ...; M: the matrices, (links, C, K); weights: after a
    last step, the candidates' weights, (links, 1), or (links, n) with n >= C, of which the first C columns count.
    """

    kind: tuple
    chains: list[Candidate] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    M: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def bns(self) -> list[nn.BatchNorm2d]:
        return [link.bn for link in self.links]


@dataclass
class EdgeGroup:
    """Edges that run together, from each of S sources to each of n_targets nodes.

    They are numbered source by source: edge s * n_targets + t is from source s to target t. products[t]: step t of the
    chains that have more steps than t + 1; products[-1]: the last step of every chain; weights_of_equal: the weights of
    the candidates with equal outputs, (candidates * S * n_targets, 1).
    """

    n_targets: int
    candidates: list[Candidate]
    chains: list[Candidate]
    products: list[list[Product]]
    weights_of_equal: torch.Tensor | None = None


class Layout:
    """A way to run the edges from some sources.

    A subclass has `mixed(states, group, statistics)`, the weighted sum of the candidates' outputs for each target: a
    list of tensors (N, C, h, w). states: the sources, (N, C, H, W); group: an `EdgeGroup`; statistics: a
    `RunningStatistics`. It also has the steps that are called here: `_repeated`, `_depthwise`, `_normalised`,
    `_add_mixture`, `_pooled` and `_batch_norm`.
    """

    relu_in_depthwise = False  # whether `_depthwise` computes the ReLU too
    weights_by_channel = False  # whether the weights of chains are repeated for each channel

    def edge_groups(self, operations: list[list], weights: torch.Tensor) -> list[EdgeGroup]:
        """The groups of a cell. What needs no images is computed here, with a few calls for the whole cell.

        operations: for each group, operations[s][t] are the candidates on the edge from source s to target t; weights:
        (candidates, edges), the edges of the first group, source by source, then those of the second, ...
        """
        sizes = [len(ops) * len(ops[0]) for ops in operations]
        parts = weights.flatten().split(sizes * len(weights))  # candidate 0 in each group, 1 in each, ...
        groups = [self._group(ops, parts[g :: len(sizes)]) for g, ops in enumerate(operations)]
        _stack_parameters(groups)
        equal = [
            [candidate for candidate in group.candidates if candidate.kind in ("skip", "pool")] for group in groups
        ]
        for group, joined in zip(groups, _joined_weights(equal)):
            group.weights_of_equal = joined
        products = [product for group in groups for product in group.products[-1]]
        C = max((product.M.shape[1] for product in products), default=1) if self.weights_by_channel else 1
        for product, joined in zip(products, _joined_weights([product.chains for product in products], C)):
            product.weights = joined
        return groups

    def _group(self, operations, weights):
        """An `EdgeGroup` whose parameters and weights are not stacked yet. weights: for each candidate, (edges,)."""
        by_candidate = zip(*itertools.chain(*operations), strict=True)
        candidates = [Candidate(list(ops), w, kind_of(ops)) for ops, w in zip(by_candidate, weights, strict=True)]
        chains = [candidate for candidate in candidates if candidate.kind == "chain"]
        for chain in chains:
            chain.links = list(zip(*map(links_of, chain.ops)))
        products = [[] for _ in range(max((len(chain.links) for chain in chains), default=1))]
        for chain in chains:
            for links, products_of_step in zip(chain.links[:-1], products):
                _add_to_products(products_of_step, chain, links)
        for chain in sorted(chains, key=lambda chain: len(chain.links)):
            _add_to_products(products[-1], chain, chain.links[-1])
        return EdgeGroup(len(operations[0]), candidates, chains, products)

    def _equal_outputs(self, x, candidates, statistics):
        """The outputs of skip connections and pools, which are equal on all edges from x."""
        outputs = []
        for candidate in candidates:
            if candidate.kind == "skip":
                outputs.append(x)
            elif candidate.kind == "pool":
                bns = [op[1] for op in candidate.ops]
                outputs.append(self._batch_norm(self._pooled(candidate.ops[0][0], x), bns, statistics))
        return outputs

    def _add_chains(self, bases, sources, group, statistics):
        """bases plus the weighted outputs of all chains of a group."""
        images = self._first_images(sources, group)
        for t, products in enumerate(group.products):
            chains = [chain for chain in group.chains if len(chain.links) > t]
            jobs = [(chain.links[t], chain.kernels[t], images[chain]) for chain in chains]
            images.update(zip(chains, self._depthwise(jobs)))
            for product in products:
                zs = [images[chain] for chain in product.chains]
                if products is group.products[-1]:
                    bases = self._add_mixture(bases, product, zs, group.n_targets, statistics)
                else:
                    images.update(zip(product.chains, self._normalised(product, zs, statistics)))
        return bases

    def _first_images(self, sources, group):
        """chain -> what its first step convolves: the sources, repeated for each target.

        Chains that need the same get the same tensors. FactorizedReduce, which has no depthwise convolution, needs
        every second pixel.
        """

        @functools.cache
        def images(has_depthwise):
            activated = sources if has_depthwise and self.relu_in_depthwise else [x.relu() for x in sources]
            pixels = activated if has_depthwise else [even_and_odd(x) for x in activated]
            return self._repeated(pixels, group.n_targets)

        return {chain: images(chain.links[0][0].depthwise is not None) for chain in group.chains}


class RunningStatistics:
    """Means and unbiased variances of batches, which become part of the modules' running statistics at the end."""

    def __init__(self):
        self.bns, self.means, self.variances = [], [], []
        self.zeros = None  # zeros that nobody uses yet

    def moments(self, n: int, like: torch.Tensor) -> torch.Tensor:
        """Two rows of n zeros, cut from a larger tensor, since each allocation of zeros would be a launch on CUDA."""
        if self.zeros is None or self.zeros.shape[1] < n:
            self.zeros = like.new_zeros(2, max(n, 8192))
        moments, self.zeros = self.zeros.split([n, self.zeros.shape[1] - n], 1)
        return moments

    def add(self, bns: list[nn.BatchNorm2d], means: torch.Tensor, variances: torch.Tensor) -> None:
        """Note the statistics of some BN layers.

        means, variances: (rows, C), for equally many layers each: the first row for the first of them, and so on.
        """
        if bns[0].track_running_stats:
            repeats = len(bns) // len(means)
            self.bns += bns
            self.means += [row for row in means.unbind() for _ in range(repeats)]
            self.variances += [row for row in variances.unbind() for _ in range(repeats)]

    @torch.no_grad()
    def record(self) -> None:
        """Update the running statistics as the modules would: towards the batch's by `momentum`."""
        for momentum in {bn.momentum for bn in self.bns}:
            indices = [i for i, bn in enumerate(self.bns) if bn.momentum == momentum]
            bns = [self.bns[i] for i in indices]
            torch._foreach_lerp_([bn.running_mean for bn in bns], [self.means[i] for i in indices], momentum)
            torch._foreach_lerp_([bn.running_var for bn in bns], [self.variances[i] for i in indices], momentum)
            counts = [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None]
            if counts:
                torch._foreach_add_(counts, 1)


def kind_of(ops: tuple[nn.Module, ...]) -> str:
    """How these operations, the same candidate on several edges, run; see `Candidate`."""
    signatures = [signature(op) for op in ops]
    if signatures[0] is None or signatures.count(signatures[0]) < len(signatures):
        return "separate"
    if signatures[0] not in _KINDS:
        _KINDS[signatures[0]] = _kind_by_class(ops[0])
    return _KINDS[signatures[0]]


_KINDS = {}  # signature -> kind


def _kind_by_class(op):
    if type(op) is Identity:
        return "skip"
    if type(op) is Zero:
        return "zero"
    if type(op) is PoolBN and len(op) == 2 and type(op[0]) in POOLS and _is_bn_without_weight(op[1]):
        return "pool" if op[1].training else "separate"  # running statistics may differ from edge to edge
    links = links_of(op)
    if links and all(is_standard_link(link) and _is_bn_without_weight(link.bn) for link in links):
        return "chain"
    logging.getLogger("darts").info(f"operations that the fused execution does not know run by themselves: {op}")
    return "separate"


def _is_bn_without_weight(bn):
    return is_standard_bn(bn) and bn.weight is None


def separate_output(op: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """op(x). Raises ValueError unless it has the shape that an operation must give, since a sum may broadcast it."""
    y = op(x)
    half = [-(-side // 2) for side in x.shape[2:]]
    if y.shape[:2] != x.shape[:2] or list(y.shape[2:]) not in (list(x.shape[2:]), half):
        raise ValueError(
            f"an operation must keep images and channels, and leave ceil(size / stride) pixels a side: of "
            f"{tuple(x.shape)} it made {tuple(y.shape)}: {op}"
        )
    return y


def _add_to_products(products, chain, links):
    """Add a step of a chain to the last of the products, or to a new one if it is of another kind."""
    link = links[0]
    shapes = [conv.weight.shape for conv in link.pointwise]
    kind = shapes, signature(link.bn)
    if not products or products[-1].kind != kind:
        products.append(Product(kind))
    products[-1].chains.append(chain)
    products[-1].links += links


def _stack_parameters(groups):
    """Set the kernels of all chains and the matrices of all products, with one call for all tensors."""
    chains = [chain for group in groups for chain in group.chains]
    products = [product for group in groups for product in itertools.chain(*group.products)]
    tensors = []  # lists of weights of one shape
    for chain in chains:
        tensors += [
            [link.depthwise.weight for link in links] for links in chain.links if links[0].depthwise is not None
        ]
    for product in products:
        tensors += zip(*([conv.weight for conv in link.pointwise] for link in product.links))
    stacks = iter(_Stacks.apply(list(map(len, tensors)), *itertools.chain(*tensors)) if tensors else [])
    for chain in chains:
        chain.kernels = [None if links[0].depthwise is None else next(stacks) for links in chain.links]
    for product in products:
        M, *second = [next(stacks).flatten(2) for _ in product.links[0].pointwise]
        product.M = _block_diagonal(M, *second) if second else M


def _joined_weights(lists, C=1):
    """The weights of each list of candidates as one tensor (weights, C), C equal columns; one call for all lists."""
    weights = [[candidate.weights for candidate in candidates] for candidates in lists]
    joined = torch.cat(list(itertools.chain(*weights))) if any(weights) else torch.zeros(0)
    return joined.unsqueeze(1).expand(-1, C).contiguous().split([sum(map(len, part)) for part in weights])


def _block_diagonal(A, B):
    """Matrices with A, (E, C, K), above and left of B, (E, D, L), and zeros elsewhere: (E, C + D, K + L)."""
    return torch.cat([F.pad(A, (0, B.shape[2])), F.pad(B, (A.shape[2], 0))], 1)


class _Stacks(torch.autograd.Function):
    """The stack of the first sizes[0] tensors, of the next sizes[1], ...: one call where PyTorch needs one a stack."""

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


def even_and_odd(x: torch.Tensor) -> torch.Tensor:
    """What FactorizedReduce's two convolutions read: the even and the odd pixels, one after the other as channels."""
    H, W = x.shape[-2:]
    x = dense_gradient(x)
    return torch.cat([x[..., ::2, ::2], F.pad(x[..., 1::2, 1::2], (0, W % 2, 0, H % 2))], -3)


def batch_norm(images, bns, scale, statistics):
    """PyTorch's BN, times a scale (E * C,), of images (N, E * C, ...) of E edges.

    In training the means and variances go to `statistics`, if the modules record any.
    """
    if not bns[0].training:
        mean, var = (torch.cat(values) for values in zip(*((bn.running_mean, bn.running_var) for bn in bns)))
        return F.batch_norm(images, mean, var, scale, None, False, 0.0, bns[0].eps)
    shape = -1, bns[0].num_features
    if is_synced(bns[0]):
        y, *moments = synced_batch_norm(images, scale, None, bns[0].eps)
        statistics.add(bns, *(values.to(bns[0].running_mean.dtype).view(shape) for values in moments))
        return y
    if not bns[0].track_running_stats:
        return F.batch_norm(images, None, None, scale, None, True, 1.0, bns[0].eps)
    moments = statistics.moments(images.shape[1], like=bns[0].running_mean)
    y = F.batch_norm(images, *moments, scale, None, True, 1.0, bns[0].eps)
    statistics.add(bns, *moments.unflatten(1, shape))
    return y


def add(total, term):
    """total + term; total may be None, the empty sum."""
    return term if total is None else total + term
