"""The fused execution of the search cell: the sum that `SearchCell` defines, in fewer and larger steps.

Node i of a cell is the sum over its sources j and candidates o of w_ijo * o_ij(state_j). Here, in the paper's terms:

1. Edges whose sources are there run together: first all edges from both inputs, then those from each new node. They
   share relu(state_j), and both pools with their normalisation, which have no weights; `none` costs nothing. What they
   share is mixed for all of them in one step.
2. A chain of (activation, depthwise, pointwise, BN) runs on all its edges at once, as E images of C channels. On CUDA
   the pointwise convolutions of all edges are one batched matrix product, the depthwise ones one grouped convolution;
   on the CPU all depthwise convolutions of a step are one operation.
3. The last BN of a chain, the weighting and the sum over candidates are one step. On the CPU it is `Mixture`, which
   keeps what the depthwise convolutions gave alone (models/folded_bn.py has the mathematics); elsewhere, where a launch
   costs more than another pass over the data, it is PyTorch's BN, with w as its scale.

There are two ways of laying the tensors out, see `choose_path`. A candidate that does not have one of these
forms, or has a hook, runs by itself on each edge, so a new primitive works before it is fast. Every result can be
differentiated twice, but for BN over several ranks.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from models import sync_bn
from models.fast import native, remake
from models.fast.chains import geometry, is_plain, is_plain_bn, links_of, signature
from models.fast.depthwise import channels_last_depthwises, every_second, is_subsampling
from models.fast.folded_bn import Mixture
from models.ops import Identity, PoolBN, Zero

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def nodes(dag, s0, s1, w_dag, recompute=False):
    """The nodes of a search cell: a list of tensors (N, C, H, W).

    dag[i][j]: the `MixedOp` from state j to node i; s0, s1: (N, C, H, W), the first two states; w_dag[i]:
    (i + 2, candidates), the weights of node i's edges. In training, running statistics are recorded as modules would.
    recompute: where `remakes`, what chains compute is not kept for the backward pass but computed again.
    """
    rows = [weights.unbind() for weights in w_dag]
    states, sums, statistics = [s0, s1], [None] * len(dag), _Statistics()
    for sources in ([0, 1], *([j] for j in range(2, len(dag) + 1))):
        targets = range(sources[-1] - 1, len(dag))
        edges = [[dag[i][j]._ops for i in targets] for j in sources]
        weights = [torch.stack([rows[i][j] for i in targets]) for j in sources]
        from_sources = [states[j] for j in sources]
        path = choose_path(from_sources[0])
        with remake.remaking(recompute):
            outputs = path.mixed(from_sources, edges, weights, statistics)
        for i, output in zip(targets, outputs):
            sums[i] = output if sums[i] is None else sums[i] + output
        states.append(sums[targets[0]])
    statistics.record()
    return states[2:]


def choose_path(x):
    """How the edges from states like x run.

    On CUDA a launch is dear and its kernels like large tensors: all edges at once. On the CPU edge by edge, since what
    lies in the cache is used again, channels-last and in C.
    """
    return EDGE_BY_EDGE if x.device.type == "cpu" else BATCHED


def remakes(x):
    """Whether `nodes` with recompute keeps less for states like x. Elsewhere a cell can be run forward as a whole
    again."""
    return choose_path(x) is EDGE_BY_EDGE


class _Path:
    """A way of running the edges from some sources, E at once.

    What is the same for all: in which order what runs. A subclass says how images of E edges lie in memory and how each
    step is done there: `mixed` is what is asked of it, the others are used here.
    """

    folded = ()  # activations that `_convolved` does

    def _weightless(self, x, kinds, candidates, w_columns, statistics):
        """The candidates that are no chains, of all edges from x, as what is still to be weighted and what is not.

        candidates: each on all edges; w_columns: the edges' weights of each. Returns weights (E, terms) and terms, the
        same for all edges, and a weighted sum, edges first; None for weights or sum where there is nothing.
        """
        columns, terms, base = [], [], None
        for column, ops, kind in zip(w_columns, candidates, kinds):
            if kind == "skip":
                columns.append(column)
                terms.append(x)
            elif kind == "pool":
                pooled = self._outside(_pooling(ops[0][0]), x)
                bns = [op[1] for op in ops]
                if bns[0].training:  # the statistics are the same for all edges of a source
                    columns.append(column)
                    terms.append(self._batch_norm(pooled, bns, statistics))
                else:  # the recorded ones need not be
                    base = _plus(base, self._stack(pooled, *_recorded(bns, column)))
            elif kind == "alone" or (kind == "zero" and set(kinds) == {"zero"}):
                base = _plus(base, self._one_by_one(ops, x) * column[:, None, None, None, None])
        return torch.stack(columns, 1) if terms else None, terms, base

    def _chains(self, inputs, bases, kinds, candidates, w_columns, statistics):
        """bases plus the candidates that are chains, weighted; see `_weightless`."""
        chains = [(column, ops) for column, ops, kind in zip(w_columns, candidates, kinds) if kind == "chain"]
        if not chains:
            return bases
        going = [(column, list(zip(*map(links_of, ops)))) for column, ops in chains]  # [step][edge]: a Link
        matrices = iter(_stacked([weights for _, steps in going for links in steps for weights in _weights(links)]))
        going = [(column, [(links, [next(matrices) for _ in range(1 if links[0].spatial is None else 2)])
                           for links in steps],
                  inputs(steps[0][0], self._activation(steps[0][0])))
                 for column, steps in going]  # fmt: skip
        ends = []
        while going:
            convolved = iter(
                self._convolved([(links, x, kernel[0]) for _, ((links, (*kernel, _)), *_), x in going if kernel])
            )
            inner = []
            for column, ((links, (*kernel, M)), *rest), x in going:
                z = next(convolved) if kernel else self._unconvolved(x)
                (inner if rest else ends).append((column, rest, z, M.flatten(2), [link.bn for link in links]))
            normalised = self._normalised(inner, statistics)
            going = [
                (column, rest, [self._activation(rest[0][0][0])(y) for y in of_step])
                for (column, rest, *_), of_step in zip(inner, normalised)
            ]
        return self._mixture(bases, ends, statistics)

    def _activation(self, link):
        """What is still to be done before a link's `_convolved`."""
        folded = link.spatial is not None and type(link.activation) in self.folded
        return nn.Identity() if folded else link.activation


class _EdgeByEdge(_Path):
    """An edge after the other: what lies in the cache is used again. An edge's images are a channels-last tensor
    (N, C, H, W), E edges a list of those. BN and pointwise convolutions are done by `Mixture`."""

    folded = (nn.ReLU,)

    def mixed(self, states, edges, weights, statistics):
        """For each target the sum of its edges from these states, (N, C, h, w).

        edges[s][t]: the candidates from state s to target t; weights[s]: (targets, candidates).
        """
        n, kinds, candidates, columns = _table(edges, weights)
        sources = [state.contiguous(memory_format=torch.channels_last) for state in states]
        bases = []
        for i, (source, of_state) in enumerate(zip(sources, edges)):
            own = [column[i * n : (i + 1) * n] for column in columns]
            w, terms, base = self._weightless(source, kinds, zip(*of_state), own, statistics)
            mixed = _Blend.apply(w, *terms) if terms else [0] * n
            if terms or base is not None:
                bases += mixed if base is None else map(torch.add, base.unbind(), mixed)
        outputs = self._chains(_Inputs(sources, n, self._spread), bases, kinds, candidates, columns, statistics)
        return [sum(outputs[t + n :: n], start=outputs[t]) for t in range(n)]

    def _spread(self, sources, n):
        return [source for source in sources for _ in range(n)]

    def _convolved(self, jobs):
        """Of each job (links, images, kernels (E, C, 1, k, k)) the depthwise convolutions, a list of E images.

        All convolutions of images of one size are one operation.
        """
        of_size = {}
        for j, (links, images, kernels) in enumerate(jobs):
            how, relu = _geometry(links[0].spatial), type(links[0].activation) in self.folded
            found, convolutions, stacks, places = of_size.setdefault(images[0].shape, ({}, [], [], []))
            for row, image in enumerate(images):
                place, *_ = found.setdefault((id(image), relu), (len(found), image, relu))
                convolutions.append((place, len(stacks), row, how))
                places.append(j)
            stacks.append(kernels)
        outputs = [[] for _ in jobs]
        for found, convolutions, stacks, places in of_size.values():
            _, images, relus = zip(*found.values())
            for j, z in zip(places, channels_last_depthwises(images, relus, stacks, convolutions)):
                outputs[j].append(z)
        return outputs

    def _unconvolved(self, images):
        return images

    def _normalised(self, steps, statistics):
        """BN(M z) of each step: a list of E images."""
        outputs = []
        for zs, M, bns in _alike(steps):
            images = list(itertools.chain(*zs))
            if bns[0].training:
                mean, var, *ys = Mixture.apply(bns[0].eps, _is_synced(bns), len(images), None, None, M, *images)
                statistics.add(bns, mean, var)
            else:
                ys = _affine(M, images, *_recorded(bns))
            outputs += _rows(ys, len(zs[0]))
        return outputs

    def _mixture(self, bases, steps, statistics):
        """bases + sum of w BN(M z) over the steps, the last of their chains."""
        columns = iter([step[0] for step in steps])
        for zs, M, bns in _alike(steps):
            w = torch.cat([next(columns) for _ in zs])
            images, edges = list(itertools.chain(*zs)), len(zs[0])
            if bns[0].training:
                mean, var, *bases = Mixture.apply(bns[0].eps, _is_synced(bns), edges, w, None, M, *images, *bases)
                statistics.add(bns, mean, var)
            else:
                for ys in _rows(_affine(M, images, *_recorded(bns, w)), edges):
                    bases = [base + y for base, y in zip(bases, ys)] if bases else ys
        return bases

    def _outside(self, function, x):
        return function(x)

    def _stack(self, x, factor, shift):
        """factor x + shift of each edge, factor and shift (E, C): (E, N, C, H, W)."""
        return x * factor[:, None, :, None, None] + shift[:, None, :, None, None]

    def _one_by_one(self, ops, x):
        return torch.stack([op(x) for op in ops])

    def _batch_norm(self, x, bns, statistics):
        """PyTorch's BN of x by the statistics of the batch."""
        y, moments = _batch_norm(x, bns, None)
        statistics.add(bns, *moments.unsqueeze(1))
        if not _is_synced(bns):
            remake.can_be_made([y], lambda x: [_batch_norm(x, bns, None)[0]], [x])
        return y


class _Batched(_Path):
    """All edges at once: few large steps. E edges are one tensor (E, C, N, H, W), in this order in memory."""

    def mixed(self, states, edges, weights, statistics):
        """See `_EdgeByEdge.mixed`."""
        n, kinds, candidates, columns = _table(edges, weights)
        source = torch.stack([state.transpose(0, 1) for state in states])
        w, terms, bases = self._weightless(source, kinds, candidates, columns, statistics)
        bases = _plus(bases, self._mix(w, terms)) if terms else bases
        outputs = self._chains(_Inputs([source], n, self._spread), bases, kinds, candidates, columns, statistics)
        outputs = outputs.unflatten(0, (len(states), n))
        return [output.transpose(0, 1) for output in (outputs.sum(0) if len(states) > 1 else outputs[0]).unbind()]

    def _spread(self, sources, n):
        return [source.unsqueeze(1).expand(-1, n, -1, -1, -1, -1).flatten(0, 1) for source in sources]

    def _convolved(self, jobs):
        return [_grouped_depthwise(x, kernels, *_geometry(links[0].spatial)) for links, (x,), kernels in jobs]

    def _unconvolved(self, x):
        return x[0]

    def _normalised(self, steps, statistics):
        """BN(M z) of each step, (E, C, N, H, W), as the one of a list."""
        outputs = []
        for zs, M, bns in _alike(steps):
            y = (M @ torch.cat(zs).flatten(2)).unflatten(2, zs[0].shape[2:])
            y = self._batch_norm(y, bns, statistics) if bns[0].training else self._affine(y, *_recorded(bns))
            outputs += [[part] for part in y.split(len(zs[0]))]
        return outputs

    def _mixture(self, bases, steps, statistics):
        """bases + sum of w BN(M z) over the steps, the last of their chains."""
        columns = iter([step[0] for step in steps])
        for zs, M, bns in _alike(steps):
            w = torch.cat([next(columns) for _ in zs])
            y = (M @ torch.cat(zs).flatten(2)).unflatten(2, zs[0].shape[2:])
            if bns[0].training:
                scale = w.unsqueeze(1).expand(-1, M.shape[1]).flatten()
                y = self._batch_norm(y, bns, statistics, scale)
            else:
                y = self._affine(y, *_recorded(bns, w))
            bases = _plus(bases, y.unflatten(0, (-1, len(zs[0]))).sum(0))
        return bases

    def _outside(self, function, x):
        """A function of images (N, C, H, W) that keeps channels apart, at x."""
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _affine(self, x, factor, shift):
        return x * factor[:, :, None, None, None] + shift[:, :, None, None, None]

    def _stack(self, x, factor, shift):
        """factor x + shift of each edge from the S sources x."""
        return self._affine(x.repeat_interleave(len(factor) // len(x), 0), factor, shift)

    def _mix(self, weights, terms):
        """Sums of the terms, each (S, C, N, H, W): weights (edges, terms) -> (edges, C, N, H, W)."""
        stacked = torch.stack(terms, 1)
        mixed = weights.unflatten(0, (len(stacked), -1)) @ stacked.flatten(2)
        return mixed.unflatten(2, stacked.shape[2:]).flatten(0, 1)

    def _one_by_one(self, ops, x):
        sources = (x[i * len(x) // len(ops)].transpose(0, 1) for i in range(len(ops)))
        return torch.stack([op(source).transpose(0, 1) for op, source in zip(ops, sources)])

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x by the statistics of the batch, times a scale (E * C,)."""
        y, moments = _batch_norm(x.reshape(1, -1, x.shape[2:].numel()), bns, scale)
        statistics.add(bns, *moments.unflatten(1, x.shape[:2]))
        return y.view_as(x)


def _table(edges, weights):
    """Of edges[source][target], a list of candidates each: targets; each candidate's kind, its operations, its weights
    on all edges, source by source."""
    candidates = list(zip(*itertools.chain(*edges)))
    columns = (torch.cat(weights) if len(weights) > 1 else weights[0]).unbind(1)
    return len(edges[0]), [_kind(ops) for ops in candidates], candidates, columns


def _batch_norm(images, bns, scale):
    """PyTorch's BN by the statistics of the batch, times a scale (C,): the output, and mean and variance (2, C)."""
    moments = images.new_zeros(2, images.shape[1], dtype=bns[0].running_mean.dtype)
    if not _is_synced(bns):
        return F.batch_norm(images, *moments, scale, None, True, 1.0, bns[0].eps), moments
    y, *found = sync_bn.batch_norm(images, scale, None, bns[0].eps)
    torch._foreach_copy_(list(moments), found)
    return y, moments


class _Blend(torch.autograd.Function):
    """Weighted sums of images: weights (E, terms) and the terms, (N, C, h, w), give E images."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, weights, *images):
        ctx.save_for_backward(weights, *images)
        return tuple(native.blend(list(images), weights))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *gs):
        weights, *images = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_weights = torch.stack([torch.stack([(g * image).sum() for image in images]) for g in gs])
            of_images = torch.einsum("et,encij->tncij", weights, torch.stack(gs)).unbind()
            return of_weights, *of_images
        of_weights = native.dots(list(gs), images).to(weights.dtype) if ctx.needs_input_grad[0] else None
        wanted = any(ctx.needs_input_grad[1:])
        return of_weights, *(native.blend(list(gs), weights.T) if wanted else [None] * len(images))


def _pooling(pool):
    """The pooling of a module, as a function that keeps less for the gradient."""
    if pool.ceil_mode:
        return pool
    geometry = [_pair(size) for size in (pool.kernel_size, pool.stride, pool.padding)]
    if type(pool) is nn.MaxPool2d:
        return lambda x: _MaxPool.apply(x, *geometry, _pair(pool.dilation))
    return lambda x: _AvgPool.apply(x, *geometry, False, pool.count_include_pad, pool.divisor_override)


def _pair(size):
    return list(size) if isinstance(size, tuple) else [size, size]


class _MaxPool(torch.autograd.Function):
    """`F.max_pool2d`, keeping in 16 bits where each maximum was, instead of the input and 64 bits."""

    @staticmethod
    def forward(ctx, x, *geometry):
        y, places = F.max_pool2d(x, *geometry, return_indices=True)
        ctx.save_for_backward(places.short() if x.shape[2:].numel() < 2**15 else places)
        ctx.geometry, ctx.like = geometry, (x.shape, x.stride())
        return y

    @staticmethod
    def backward(ctx, g):
        (places,) = ctx.saved_tensors
        shape_of_x = g.new_empty_strided(*ctx.like)  # its values are not read
        gradient = torch.ops.aten.max_pool2d_with_indices_backward
        return gradient(g, shape_of_x, *ctx.geometry, False, places.long()), None, None, None, None


class _AvgPool(torch.autograd.Function):
    """`F.avg_pool2d`, keeping nothing instead of the input."""

    @staticmethod
    def forward(ctx, x, *geometry):
        ctx.geometry, ctx.like = geometry, (x.shape, x.stride())
        return F.avg_pool2d(x, *geometry)

    @staticmethod
    def backward(ctx, g):
        shape_of_x = g.new_empty_strided(*ctx.like)  # its values are not read
        return torch.ops.aten.avg_pool2d_backward(g, shape_of_x, *ctx.geometry), *[None] * len(ctx.geometry)


def _affine(M, images, factor, shift):
    """factor M z + shift of each product: M (products, C, K), factor and shift (products, C)."""
    A = factor.unsqueeze(-1) * M
    return [F.conv2d(z, A_k[:, :, None, None], shift_k) for z, A_k, shift_k in zip(images, A, shift)]


def _rows(tensors, n):
    """A list cut into lists of n."""
    return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]


def _grouped_depthwise(x, weight, stride, padding, dilation):
    """One convolution with a group for each image and channel: (E, C, N, H, W) is (1, E * C * N, H, W) in memory."""
    N = x.shape[2]
    kernels = weight.expand(-1, -1, N, -1, -1).flatten(0, 2).unsqueeze(1)
    z = F.conv2d(x.flatten(0, 2).unsqueeze(0), kernels, None, stride, padding, dilation, len(kernels))
    return z.squeeze(0).unflatten(0, x.shape[:3])


BATCHED = _Batched()
EDGE_BY_EDGE = _EdgeByEdge()


# What the modules are.


def _weights(links):
    """Of the same step on each edge: its depthwise kernels, if any, and its pointwise matrices, (C, K, ...)."""
    if links[0].spatial is not None:
        yield [link.spatial.weight for link in links]
        yield [link.pointwise[0].weight for link in links]
    else:
        yield [torch.block_diag(*(conv.weight.flatten(1) for conv in link.pointwise)) for link in links]


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


class _Inputs:
    """What chains start with: activations of the sources, `spread(..., n)` to their n edges."""

    def __init__(self, sources, n, spread):
        self.sources, self.n, self.spread, self.made = sources, n, spread, {}

    def __call__(self, link, activation):
        """What a chain with this first link convolves: all pixels, or those that it reads."""
        reads = _halves if link.spatial is None else every_second if _is_subsampling(link.spatial) else None
        kind = signature(activation), reads
        if kind not in self.made:
            activated = [activation(source) for source in self.sources]
            self.made[kind] = self.spread([reads(x) for x in activated] if reads else activated, self.n)
        return self.made[kind]


def _is_subsampling(conv):
    return is_subsampling(*geometry(conv))


def _geometry(conv):
    """(stride, padding, dilation) on the pixels that are read."""
    stride, padding, dilation = geometry(conv)
    return (1, padding // 2, 1) if _is_subsampling(conv) else (stride, padding, dilation)


def _halves(x):
    """What FactorizedReduce's two convolutions read: even and odd pixels, as channels (dimension 1) side by side."""
    H, W = x.shape[-2:]
    odd = every_second(x, 1)
    if H % 2 or W % 2:
        odd = F.pad(odd, (0, W % 2, 0, H % 2))
    return torch.cat([every_second(x), odd], 1)


def _alike(steps):
    """Runs of steps whose matrices have one shape and BN of one kind: (zs, all matrices, all BN) of each."""

    def kind(step):
        bn = step[-1][0]
        return step[-2].shape, type(bn), bn.eps, bn.training, bn.track_running_stats

    for _, run in itertools.groupby(steps, kind):
        *_, zs, Ms, bns = zip(*run)
        yield zs, torch.cat(Ms), list(itertools.chain(*bns))


def _recorded(bns, w=None):
    """BN by running statistics, times w, as y = factor * u + shift: two tensors (BN, C)."""
    mean = torch.stack([bn.running_mean for bn in bns])
    factor = torch.stack([(bn.running_var + bn.eps).rsqrt() for bn in bns])
    factor = factor if w is None else factor * w.unsqueeze(1)
    return factor, -factor * mean


def _plus(total, term):
    return term if total is None else total + term


class _Statistics:
    """Means and unbiased variances on their way to the modules' running statistics."""

    def __init__(self):
        self.bns, self.means, self.variances = [], [], []

    def add(self, bns, means, variances):
        """means, variances: (..., C), each for as many of the bns in a row as there are for one."""
        if bns[0].track_running_stats:
            self.bns += bns
            for found, moments in ((self.means, means), (self.variances, variances)):
                rows = moments.flatten(0, -2).unbind()
                found += [row for row in rows for _ in range(len(bns) // len(rows))]

    @torch.no_grad()
    def record(self):
        """Update them as the modules would: towards the batch's by `momentum`."""
        for momentum in {bn.momentum for bn in self.bns}:
            chosen = [i for i, bn in enumerate(self.bns) if bn.momentum == momentum]
            bns = [self.bns[i] for i in chosen]
            torch._foreach_lerp_([bn.running_mean for bn in bns], [self.means[i] for i in chosen], momentum)
            torch._foreach_lerp_([bn.running_var for bn in bns], [self.variances[i] for i in chosen], momentum)
            torch._foreach_add_([bn.num_batches_tracked for bn in bns], 1)


_KINDS = {}


def _kind(ops):
    """How these operations, the same candidate on several edges, run: pool, skip, chain, zero, or alone."""
    signatures = [signature(op) for op in ops]
    if signatures[0] is None or signatures.count(signatures[0]) < len(signatures):
        return "alone"
    if signatures[0] not in _KINDS:
        _KINDS[signatures[0]] = _classify(ops[0])
    return _KINDS[signatures[0]]


def _classify(op):
    kind = type(op)
    if kind in (Identity, Zero):
        return "skip" if kind is Identity else "zero"
    if kind is PoolBN:
        return "pool" if type(op[0]) in POOLS and _is_bare(op[1]) else "alone"
    links = links_of(op)
    return "chain" if links and all(is_plain(link) and _is_bare(link.bn) for link in links) else "alone"


def _is_bare(bn):
    """Whether this is BN as a search cell has it, without weights of its own."""
    return is_plain_bn(bn) and bn.weight is None


def _is_synced(bns):
    return type(bns[0]) is sync_bn.SyncBatchNorm2d
