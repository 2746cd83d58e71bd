"""The fused execution of the search cell: the sum that `SearchCell` defines, in fewer and larger steps.

Node i of a cell is the sum over its sources j and candidates o of w_ijo * o_ij(state_j). Here, in the paper's terms:

1. Edges whose sources are there run together: first all edges from both inputs, then those from each new node. They
   share relu(state_j), and both pools with their normalisation, which have no weights; `none` costs nothing. What has
   no weights is mixed by one matrix product.
2. A chain of (activation, depthwise, pointwise, BN) runs on all its edges at once, as E images of C channels: the
   pointwise convolutions of all edges are one batched matrix product, the depthwise ones one grouped convolution.
3. The last BN of a chain and the weighting are one step. With z = depthwise(...) as a matrix (C, pixels), M the
   pointwise weights, and mean and variance over the pixels,

       y = sum_k w_k (M_k z_k - mean_k) / sqrt(var_k + eps)                                    (BN has no affine part)

   For large images on the CPU (`_Mixture`) M_k z_k is never formed: with the mean m and the covariance S of z,
   mean = M m and var = diag(M S M'), so y is one matrix product more, sum_k A_k z_k + const with
   A_k = w_k diag(var_k + eps)^-1/2 M_k, and only z has to be kept. For the gradient let g = dL/dy, R = sum over pixels
   of g (z - m)' and v = diag(M R'):

       dL/dw  = sum over channels of v / sqrt(var + eps)
       dL/dM  = diag(w) diag(var + eps)^-1/2 R - n diag(c) M S      with c = w v (var + eps)^-3/2 / n, for n pixels
       dL/dz  = A' g - M' diag(c) M (z - m) - (mean over the pixels of A' g)

   Elsewhere, where a launch costs more than another pass over the data, it is PyTorch's BN, with w as its scale.

Two ways of laying the tensors out serve three cases, see `choose_path`. A candidate that does not have one of these
forms, or has a hook, runs by itself on each edge, so a new primitive works before it is fast. Every result can be
differentiated twice, but for BN over several ranks.
"""

import itertools
import math
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

from models import sync_bn
from models.depthwise import (
    FEW_PIXELS,
    DepthwiseConv2d,
    channels_last_depthwise,
    dense_depthwise,
    dense_gradient,
    every_second,
)
from models.ops import DilConv, FactorizedReduce, Identity, PoolBN, SepConv, Zero

FEW_NUMBERS = 2**11  # in an image; not in a batch, since all ranks must choose alike
ELEMENTWISE = (nn.ReLU, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh)  # activations that work in any layout
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


def nodes(dag, s0, s1, w_dag):
    """The nodes of a search cell: a list of tensors (N, C, H, W).

    dag[i][j]: the `MixedOp` from state j to node i; s0, s1: (N, C, H, W), the first two states; w_dag[i]:
    (i + 2, candidates), the weights of node i's edges. In training, running statistics are recorded as modules would.
    """
    rows = [weights.unbind() for weights in w_dag]
    states, sums, statistics = [s0, s1], [None] * len(dag), _Statistics()
    for sources in ([0, 1], *([j] for j in range(2, len(dag) + 1))):
        targets = range(sources[-1] - 1, len(dag))
        edges = [[dag[i][j]._ops for i in targets] for j in sources]
        weights = [torch.stack([rows[i][j] for i in targets]) for j in sources]
        from_sources = [states[j] for j in sources]
        path = choose_path(from_sources[0])
        for i, output in zip(targets, path.mixed(from_sources, edges, weights, statistics)):
            sums[i] = output if sums[i] is None else sums[i] + output
        states.append(sums[targets[0]])
    statistics.record()
    return states[2:]


def choose_path(x):
    """How the edges from states like x run.

    On CUDA a launch is dear and its kernels like large tensors: all edges at once. So it is on the CPU for images of a
    few pixels, with the depthwise convolutions as matrices. For others edge by edge, since what lies in the cache is
    used again, and channels-last, the only layout for which oneDNN's depthwise convolutions are fast.
    """
    if x.device.type != "cpu":
        return BATCHED
    few = x.shape[2:].numel() <= FEW_PIXELS and x.shape[1:].numel() <= FEW_NUMBERS
    return BATCHED_DENSE if few else EDGE_BY_EDGE


class _Path:
    """A way of running the edges from some sources.

    Inside, E images of C channels are a list of tensors (e, C, N, H, W), its parts. batched: one part with all edges,
    in that order in memory; else one for each edge, channels-last. depthwise: f(x, weight (e, C, 1, k, k), stride,
    padding, dilation). folded: normalise by `_Mixture`, else by PyTorch's BN.
    """

    def __init__(self, batched, depthwise, folded):
        self.batched, self.depthwise, self.folded = batched, depthwise, folded

    def mixed(self, states, edges, weights, statistics):
        """For each target the sum of its edges from these states, (N, C, h, w).

        edges[s][t]: the candidates from state s to target t; weights[s]: (targets, candidates).
        """
        n, candidates = len(edges[0]), list(zip(*itertools.chain(*edges)))
        columns = (torch.cat(weights) if len(weights) > 1 else weights[0]).unbind(1)
        kinds = [_kind(ops) for ops in candidates]
        if self.batched:
            sources = [torch.stack([state.transpose(0, 1) for state in states])]
            bases = self._weightless(sources[0], kinds, candidates, columns, statistics)
            bases = None if bases is None else [bases]
        else:
            sources, bases = [], []
            for i, (state, of_state) in enumerate(zip(states, edges)):
                sources.append(state.contiguous(memory_format=torch.channels_last).transpose(0, 1).unsqueeze(0))
                own = [column[i * n : (i + 1) * n] for column in columns]
                base = self._weightless(sources[-1], kinds, zip(*of_state), own, statistics)
                if base is not None:  # split as it lies in memory, so that gradients are joined in that order
                    bases += [part.permute(1, 4, 0, 2, 3) for part in base.permute(2, 0, 3, 4, 1).split(1, dim=1)]
            bases = bases or None
        inputs = _Inputs(sources, n, self.batched)
        chains = [(column, ops) for column, ops, kind in zip(columns, candidates, kinds) if kind == "chain"]
        parts = self._chains(inputs, bases, chains, statistics) if chains else bases
        if self.batched:
            parts = parts[0].unflatten(0, (len(states), n))
            return [output.transpose(0, 1) for output in (parts.sum(0) if len(states) > 1 else parts[0]).unbind()]
        totals = [sum(parts[t + n :: n], start=parts[t]) for t in range(n)]
        return [total.squeeze(0).transpose(0, 1) for total in totals]

    def _weightless(self, x, kinds, candidates, w_columns, statistics):
        """The candidates that are no chains, of all edges from the S sources x, (S, C, N, H, W): (edges, C, N, h, w).

        candidates: each on all edges; w_columns: the edges' weights of each. Pools and identity are mixed by one matrix
        product. None if all are chains.
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
                    factor, shift = _recorded(bns, column)
                    pooled = pooled.repeat_interleave(len(ops) // len(x), 0)
                    base = _plus(base, pooled * _across(factor) + _across(shift))
            elif kind == "alone" or (kind == "zero" and set(kinds) == {"zero"}):
                base = _plus(base, _one_by_one(ops, x) * column[:, None, None, None, None])
        if terms:
            weights = torch.stack(columns, 1)
            if self.batched:
                stacked = torch.stack(terms, 1)
                mixed = weights.unflatten(0, (len(x), -1)) @ stacked.flatten(2)
                mixed = mixed.unflatten(2, stacked.shape[2:]).flatten(0, 1)
            else:  # an image after the other, as they lie in memory
                terms = [dense_gradient(term.permute(2, 3, 4, 1, 0).squeeze(4)) for term in terms]
                stacked = torch.stack(terms, 1)
                mixed = torch.bmm(weights.expand(len(stacked), -1, -1), stacked.flatten(2))  # matmul would copy
                mixed = mixed.unflatten(2, stacked.shape[2:]).permute(1, 4, 0, 2, 3)
            base = _plus(base, mixed)
        return base

    def _chains(self, inputs, bases, chains, statistics):
        """bases plus the chains of E edges. chains: (the edges' weights (E,), their operations)."""
        going = [(column, list(zip(*map(_links, ops)))) for column, ops in chains]  # [step][edge]: a _Link
        matrices = iter(_stacked([weights for _, steps in going for links in steps for weights in _weights(links)]))
        going = [(column, [(links, [next(matrices) for _ in _weights(links)]) for links in steps], inputs(steps[0][0]))
                 for column, steps in going]  # fmt: skip
        ends = []
        while going:
            inner = []
            for column, ((links, (*kernel, M)), *rest), z in going:
                if kernel:
                    kernels = kernel if len(z) == 1 else kernel[0].split(1)
                    geometry = _geometry(links[0].spatial)
                    zs = [self.depthwise(part, weight, *geometry) for part, weight in zip(z, kernels)]
                else:
                    zs = z
                (inner if rest else ends).append((column, rest, zs, M, [link.bn for link in links]))
            normalised = self._normalised(inner, statistics)
            going = [
                (step[0], step[1], [step[1][0][0][0].activation(y) for y in of_step])
                for step, of_step in zip(inner, normalised)
            ]
        return self._mixture(bases, ends, statistics)

    def _normalised(self, steps, statistics):
        """BN(M z) of each step, as z is given."""
        outputs = []
        for zs, M, bns in _alike(steps):
            if not bns[0].training:
                factor, shift = (part.unflatten(0, M.shape[:2]) for part in _recorded(bns))
                outputs += [_affine(A_k, z, shift_k) for A_k, z, shift_k in zip(factor.unsqueeze(-1) * M, zs, shift)]
            elif self.folded:
                mean, var, *ys = _Mixture.apply(bns[0].eps, _is_synced(bns), len(zs[0]), None, M, *itertools.chain(*zs))
                statistics.add(bns, mean, var)
                outputs += [list(ys[i : i + len(zs[0])]) for i in range(0, len(ys), len(zs[0]))]
            else:
                y = self._batch_norm(_product(M.flatten(0, 1), torch.cat(list(itertools.chain(*zs)))), bns, statistics)
                outputs += [[part] for part in y.split(M.shape[1])]
        return outputs

    def _mixture(self, bases, steps, statistics):
        """bases + sum of w BN(M z) over the steps, the last of their chains."""
        columns = iter([step[0] for step in steps])
        for zs, M, bns in _alike(steps):
            w = torch.stack([next(columns) for _ in zs])
            if not bns[0].training:
                factor, shift = (part.unflatten(0, M.shape[:2]) for part in _recorded(bns, w.flatten()))
                for A_k, z, shift_k in zip(factor.unsqueeze(-1) * M, zs, shift):
                    ys = _affine(A_k, z, shift_k)
                    bases = ys if bases is None else [base + y for base, y in zip(bases, ys)]
            elif self.folded:
                mean, var, *bases = _Mixture.apply(
                    bns[0].eps, _is_synced(bns), len(zs[0]), w, M, *itertools.chain(*zs), *(bases or [])
                )
                statistics.add(bns, mean, var)
            else:
                scale = w.flatten().unsqueeze(1).expand(-1, M.shape[2]).flatten()
                y = self._batch_norm(
                    _product(M.flatten(0, 1), torch.cat(list(itertools.chain(*zs)))), bns, statistics, scale
                )
                bases = [_plus(bases and bases[0], y.unflatten(0, M.shape[:2]).sum(0))]
        return bases

    def _outside(self, function, x):
        """A function of images (N, C, H, W) that keeps channels apart, at x."""
        if self.batched:
            return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return function(x.squeeze(0).transpose(0, 1)).transpose(0, 1).unsqueeze(0)

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x, (E, C, N, h, w), times a scale (E * C,), by the statistics of the batch."""
        moments = x.new_zeros(2, x.shape[0] * x.shape[1], dtype=bns[0].running_mean.dtype)

        def normalise(images):
            if not _is_synced(bns):
                return F.batch_norm(images, *moments, scale, None, True, 1.0, bns[0].eps)
            y, *found = sync_bn.batch_norm(images, scale, None, bns[0].eps)
            torch._foreach_copy_(list(moments), found)
            return y

        flat = x.shape[2:].numel()
        y = normalise(x.reshape(1, -1, flat)).view_as(x) if self.batched else self._outside(normalise, x)
        statistics.add(bns, *moments.unflatten(1, x.shape[:2]))
        return y


class _Mixture(torch.autograd.Function):
    """y = base + sum_k w_k BN(M_k z_k), keeping the z_k alone; see the module's docstring, item 3.

    w: (terms, E); M: (terms, E, C, K); then the parts of each z, (e, K, N, h, w), term by term, and those of base,
    (e, C, N, h, w), if any. Returns the means and unbiased variances of M_k z_k, each (terms, E, C), and y's parts.
    Without w and base, the y of each term instead of their sum. The sums over pixels are put together in float64:
    variances are differences of such sums. synced: over the pixels of all ranks; what w and M get is this rank's part.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, eps, synced, parts, w, M, *tensors):
        ctx.save_for_backward(w, M, *tensors[: len(M) * parts])
        ctx.set_materialize_grads(False)
        zs, bases = _rows(tensors[: len(M) * parts], parts), tensors[len(M) * parts :] or [None] * parts
        dtype, n = M.dtype, zs[0][0].shape[2:].numel()
        if n < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel: a larger batch")
        M = M.double()
        m, covariance = _over_pixels(_sums, zs), _over_pixels(_gram, zs, zs)
        if synced:
            m, covariance, n = _over_ranks(m, covariance, m.new_tensor(float(n)))
        m = m / n
        covariance = covariance / n - m * m.mT
        MS = M @ covariance
        mean, var = (M @ m).squeeze(-1), (MS * M).sum(-1).clamp_(min=0)
        inverse = (var + eps).rsqrt()
        factor = inverse if w is None else inverse * w.unsqueeze(-1)
        ctx.eps, ctx.synced, ctx.parts, ctx.small = eps, synced, parts, (n, m, MS, inverse, factor)
        A, shift = _cut((factor.unsqueeze(-1) * M).to(dtype), parts), -factor * mean
        if w is None:
            shift = _cut(shift.to(dtype), parts)
            ys = [_weighted_sum(None, shift[k][p], [(A[k][p], zs[k][p])]) for k in range(len(M)) for p in range(parts)]
        else:
            shift = shift.sum(0).to(dtype).chunk(parts)
            ys = [_weighted_sum(bases[p], shift[p], [(A[k][p], zs[k][p]) for k in range(len(M))]) for p in range(parts)]
        mean, var = mean.to(dtype), (var * (n / (n - 1))).to(dtype)
        ctx.mark_non_differentiable(mean, var)
        return mean, var, *ys

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, _, __, *gs):
        w, M, *tensors = ctx.saved_tensors
        zs = _rows(tensors, ctx.parts)
        shape = len(M[0]) // ctx.parts, M.shape[2], *zs[0][0].shape[2:]
        gs = [zs[0][0].new_zeros(shape) if g is None else g for g in gs]
        if torch.is_grad_enabled() and not ctx.synced:
            return _differentiable_backward(ctx, gs, w, M, zs)
        _, _, _, wants_w, wants_M, *wants_z = ctx.needs_input_grad
        n, m, MS, inverse, factor = ctx.small
        dtype = M.dtype
        M, dbases = M.double(), gs if w is not None and len(wants_z) > len(tensors) else []
        g_parts = _rows([_in_layout_of(zs[0][0], g) for g in gs], ctx.parts)
        sums = _over_pixels(_sums, g_parts)
        g_parts = g_parts * (len(zs) // len(g_parts))  # of each term
        R = _over_pixels(_gram, g_parts, zs) - sums * m.mT
        v = (M * R).sum(-1)
        dw = (v * inverse).sum(-1).to(dtype) if wants_w else None
        c = (factor * inverse.square() * v / n).unsqueeze(-1)
        dM = (factor.unsqueeze(-1) * R - n * c * MS).to(dtype) if wants_M else None
        dzs = [None] * len(tensors)
        if any(wants_z[: len(tensors)]):
            if ctx.synced:
                v, sums = _over_ranks(v, sums)
                c = (factor * inverse.square() * v / n).unsqueeze(-1)
            At = (factor.unsqueeze(-1) * M).mT
            D = -M.mT @ (c * M)
            shift = _cut(-(D @ m + At @ (sums / n)).squeeze(-1).to(dtype), ctx.parts)
            At, D = _cut(At.to(dtype), ctx.parts), _cut(D.to(dtype), ctx.parts)
            dzs = [
                _weighted_sum(None, shift[k][p], [(At[k][p], g_parts[k][p]), (D[k][p], zs[k][p])])
                for k in range(len(zs))
                for p in range(ctx.parts)
            ]
        return None, None, None, dw, dM, *dzs, *dbases


def _over_ranks(*tensors):
    """The sums over the ranks, by one message."""
    flat = sync_bn.sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def _differentiable_backward(ctx, gs, w, M, zs):
    """`_Mixture`'s gradient as a function that can be differentiated: that of its definition."""
    with torch.enable_grad():
        given = (w, M, *itertools.chain(*zs))
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in given]  # apart from each other
        w, M, *tensors = inputs
        ys = []
        for k, of_term in enumerate(_rows(tensors, ctx.parts)):
            us = [_product(A, z) for A, z in zip(M[k].chunk(ctx.parts), of_term)]
            us = [u - u.mean((2, 3, 4), keepdim=True) for u in us]
            us = [u * (u.square().mean((2, 3, 4), keepdim=True) + ctx.eps).rsqrt() for u in us]
            if w is not None:
                us = [u * w_p[:, None, None, None, None] for u, w_p in zip(us, w[k].chunk(ctx.parts))]
            ys.append(us)
        ys = list(itertools.chain(*ys)) if w is None else [sum(of_part) for of_part in zip(*ys)]
        wants = ctx.needs_input_grad[3:]
        wanted = [i for i in range(len(inputs)) if wants[i]]
        found = torch.autograd.grad(ys, [inputs[i] for i in wanted], gs, create_graph=True)
    grads = dict(zip(wanted, found))
    dbases = gs if len(wants) > len(inputs) else []
    return None, None, None, *(grads.get(i) for i in range(len(inputs))), *dbases


def _pooling(pool):
    """The pooling of a module, as a function that keeps less for the gradient."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode:
        return pool
    return lambda x: _MaxPool.apply(x, *map(_pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation)))


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


# Matrices of pixels: x, (E, C, N, h, w), as (E, C, pixels), without copying. What is channels-last in memory, with
# E = 1, is multiplied as (pixels, C), so that the result is channels-last again.


def _is_channels_last(x):
    return len(x) == 1 and x.stride(1) == 1 and x.shape[1] > 1


def _product(A, z):
    """A z: (E, C, K) x (E, K, N, h, w) -> (E, C, N, h, w)."""
    flat = z.flatten(2)
    y = (flat[0].T @ A[0].T).T.unsqueeze(0) if _is_channels_last(z) else A @ flat
    return y.unflatten(2, z.shape[2:])


def _weighted_sum(base, shift, products):
    """base + shift + sum of A z: base (E, C, N, h, w) or None, shift (E, C), (E, C, K) and (E, K, N, h, w)."""
    y = None if base is None else (base + _across(shift)).flatten(2)
    for A, z in products:
        if _is_channels_last(z):
            flat = z.flatten(2)[0].T
            y = (torch.addmm(shift[0], flat, A[0].T) if y is None else y[0].T.addmm_(flat, A[0].T)).T[None]
        else:
            y = torch.baddbmm(shift[:, :, None], A, z.flatten(2)) if y is None else y.baddbmm_(A, z.flatten(2))
    return y.unflatten(2, z.shape[2:])


def _in_layout_of(x, g):
    """g as x lies in memory; sums of gradients need not."""
    return g.movedim(1, -1).contiguous().movedim(-1, 1) if _is_channels_last(x) else g.contiguous()


def _across(shift):
    """(E, C) to be added to (E, C, N, h, w)."""
    return shift[:, :, None, None, None]


def _affine(A, parts, shift):
    """A z + shift, for the parts of z: A (E, C, K), shift (E, C)."""
    n = len(parts)
    return [_product(A_p, z) + _across(shift_p) for A_p, z, shift_p in zip(A.chunk(n), parts, shift.chunk(n))]


def _rows(tensors, n):
    """A list cut into lists of n."""
    return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]


def _cut(small, parts):
    """A tensor (terms, E, ...) as [term][part]."""
    return [of_term.chunk(parts) for of_term in small.unbind()]


def _over_pixels(function, *operands):
    """Sums over pixels, (terms, E, ...) in float64, of [term][part] operands; function sums blocks of pixels."""
    last = all(_is_channels_last(part) for operand in operands for of_term in operand for part in of_term)
    blocks = [torch.cat([function(*parts, last) for parts in zip(*of_term)]) for of_term in zip(*operands)]
    return torch.stack(blocks).sum(2, dtype=torch.float64)


def _blocks(x):
    """(1, C, N, h, w), channels-last, as (blocks, pixels of a block, C): whole images, about 4096 pixels."""
    N, pixels = x.shape[2], x.shape[3] * x.shape[4]
    images = math.gcd(N, max(1, 4096 // pixels))
    return x.permute(0, 2, 3, 4, 1).reshape(N // images, images * pixels, -1)


def _gram(a, b, channels_last):
    """a b': (e, C, N, h, w) and (e, K, N, h, w) -> (e, blocks, C, K)."""
    if channels_last:
        return torch.bmm(_blocks(a).mT, _blocks(b)).unsqueeze(0)
    return torch.bmm(a.flatten(2), b.flatten(2).mT).unsqueeze(1)


def _sums(x, channels_last):
    """(e, C, N, h, w) -> (e, blocks, C, 1)."""
    if channels_last:
        return _blocks(x).sum(1)[None, :, :, None]
    return x.flatten(2).sum(2)[:, None, :, None]


def _one_by_one(ops, x):
    """Each operation at its source, one of the S of x, (S, C, N, H, W): (operations, C, N, h, w)."""
    sources = (x[i * len(x) // len(ops)].transpose(0, 1) for i in range(len(ops)))
    return torch.stack([op(source).transpose(0, 1) for op, source in zip(ops, sources)])


def _grouped_depthwise(x, weight, stride, padding, dilation):
    """One convolution with a group for each image and channel: (E, C, N, H, W) is (1, E * C * N, H, W) in memory."""
    N = x.shape[2]
    kernels = weight.expand(-1, -1, N, -1, -1).flatten(0, 2).unsqueeze(1)
    z = F.conv2d(x.flatten(0, 2).unsqueeze(0), kernels, None, stride, padding, dilation, len(kernels))
    return z.squeeze(0).unflatten(0, x.shape[:3])


def _dense_depthwise(x, weight, *geometry):
    z = dense_depthwise(x.flatten(0, 1), weight.flatten(0, 2), *geometry)
    return z.unflatten(0, x.shape[:2])


def _channels_last_depthwise(x, weight, *geometry):
    return (
        channels_last_depthwise(x.squeeze(0).transpose(0, 1), weight.squeeze(0), *geometry).transpose(0, 1).unsqueeze(0)
    )


BATCHED = _Path(True, _grouped_depthwise, folded=False)
BATCHED_DENSE = _Path(True, _dense_depthwise, folded=False)  # little to keep: fewer steps count for more
EDGE_BY_EDGE = _Path(False, _channels_last_depthwise, folded=True)


# What the modules are.

# a step of a chain: activation, depthwise convolution (None: FactorizedReduce's two views), pointwise ones, BN
_Link = namedtuple("_Link", "activation spatial pointwise bn")


def _links(op):
    """The steps that an operation chains."""
    if isinstance(op, SepConv):
        return [link for half in op for link in _links(half)]
    if isinstance(op, DilConv):
        activation, spatial, pointwise, bn = op
        return [_Link(activation, spatial, [pointwise], bn)]
    return [_Link(op.relu, None, [op.conv1, op.conv2], op.bn)]


def _weights(links):
    """Of the same step on each edge: its depthwise kernels, if any, and its pointwise matrices (C, K)."""
    if links[0].spatial is not None:
        yield [link.spatial.weight for link in links]
        yield [link.pointwise[0].weight.flatten(1) for link in links]
    else:
        yield [torch.block_diag(*(conv.weight.flatten(1) for conv in link.pointwise)) for link in links]


def _stacked(groups):
    """A stack of each group of tensors of one shape, by one concatenation of all."""
    if all(len(group) == 1 for group in groups):
        return [group[0].unsqueeze(0) for group in groups]
    flat = torch.cat([tensor.flatten() for group in groups for tensor in group])
    parts = flat.split([len(group) * group[0].numel() for group in groups])
    return [part.view(len(group), *group[0].shape) for part, group in zip(parts, groups)]


class _Inputs:
    """What chains start with, as parts: activations of the sources, a list of (S, C, N, H, W), for n edges each."""

    def __init__(self, sources, n, batched):
        self.sources, self.n, self.batched, self.made = sources, n, batched, {}

    def __call__(self, link):
        """What a chain with this first link convolves: all pixels, or those that it reads."""
        reads = _halves if link.spatial is None else every_second if _is_subsampling(link.spatial) else None
        kind = type(link.activation), reads
        if kind not in self.made:
            parts = [link.activation(source) for source in self.sources]
            parts = parts if reads is None else [reads(part) for part in parts]
            if self.batched:
                self.made[kind] = [parts[0].unsqueeze(1).expand(-1, self.n, -1, -1, -1, -1).flatten(0, 1)]
            else:
                self.made[kind] = [part for part in parts for _ in range(self.n)]
        return self.made[kind]


def _is_subsampling(conv):
    """Whether a convolution reads every second pixel alone, so that on those it has stride 1 and dilation 1."""
    return conv.stride[0] == conv.dilation[0] == 2 and conv.padding[0] % 2 == 0


def _geometry(conv):
    if _is_subsampling(conv):
        return 1, conv.padding[0] // 2, 1
    return conv.stride[0], conv.padding[0], conv.dilation[0]


def _halves(x):
    """What FactorizedReduce's two convolutions read: even and odd pixels, (S, C, N, H, W) -> (S, 2 C, N, h, w)."""
    H, W = x.shape[3:]
    odd = every_second(x, 1)
    if H % 2 or W % 2:
        odd = F.pad(odd, (0, W % 2, 0, H % 2))
    channels = -1 if _is_channels_last(x) else 1  # where they are in memory
    return torch.cat([half.movedim(1, channels) for half in (every_second(x), odd)], channels).movedim(channels, 1)


def _alike(steps):
    """Runs of steps whose matrices have one shape and BN of one kind: (zs, stacked matrices, all BN) of each."""

    def kind(step):
        bn = step[-1][0]
        return step[-2].shape, type(bn), bn.eps, bn.training, bn.track_running_stats

    for _, run in itertools.groupby(steps, kind):
        *_, zs, Ms, bns = zip(*run)
        yield zs, torch.stack(Ms), list(itertools.chain(*bns))


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


_CONV = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "count_include_pad", "divisor_override")
_BN = ("eps", "momentum", "training", "track_running_stats")
_SETTINGS = {
    nn.Conv2d: _CONV, DepthwiseConv2d: _CONV, nn.MaxPool2d: _POOL, nn.AvgPool2d: _POOL, Zero: ("stride",),
    nn.BatchNorm2d: _BN, sync_bn.SyncBatchNorm2d: _BN, nn.Softplus: ("beta", "threshold"), nn.ELU: ("alpha",),
    nn.GELU: ("approximate",),
}  # fmt: skip


def _signature(module):
    """What a module computes but for its weights: equal for two modules that may run as one. Hooks keep it alone."""
    if module._forward_hooks or module._forward_pre_hooks:
        return object()
    if module._modules:
        return (type(module), *[_signature(child) for child in module._modules.values()])
    own = vars(module)
    return (type(module), *[own.get(name) for name in _SETTINGS.get(type(module), ())])


_KINDS = {}


def _kind(ops):
    """How these operations, the same candidate on several edges, run: pool, skip, chain, zero, or alone."""
    signatures = [_signature(op) for op in ops]
    if signatures.count(signatures[0]) < len(ops):
        return "alone"
    if signatures[0] not in _KINDS:
        _KINDS[signatures[0]] = _classify(ops[0], signatures[0])
    return _KINDS[signatures[0]]


def _classify(op, signature):
    kind = type(op)
    if type(signature) is object:
        return "alone"
    if kind in (Identity, Zero):
        return "skip" if kind is Identity else "zero"
    if kind is PoolBN:
        return "pool" if type(op[0]) in POOLS and _is_plain_bn(op[1]) else "alone"
    if kind in (SepConv, DilConv, FactorizedReduce) and all(map(_is_plain, _links(op))):
        return "chain"
    return "alone"


def _is_plain(link):
    """Whether a link is as `models.ops` makes it, but for the activation."""
    convs = [*link.pointwise, *([] if link.spatial is None else [link.spatial])]
    return (
        type(link.activation) in ELEMENTWISE
        and all(isinstance(conv, nn.Conv2d) and conv.bias is None and conv.padding_mode == "zeros" for conv in convs)
        and (link.spatial is None or link.spatial.groups == link.spatial.in_channels == link.spatial.out_channels)
        and _is_plain_bn(link.bn)
    )


def _is_plain_bn(bn):
    kind = type(bn) is nn.BatchNorm2d or _is_synced([bn])
    return kind and bn.weight is None and bn.momentum is not None and bn.running_mean is not None


def _is_synced(bns):
    return type(bns[0]) is sync_bn.SyncBatchNorm2d
