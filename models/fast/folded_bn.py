"""Pointwise convolutions, their BN and a weighted sum of the results as one step, for the CPU.

With z as a matrix (K, pixels), M the pointwise weights (C, K), mean and variance over the pixels,

    y = sum_k w_k (M_k z_k - mean_k) / sqrt(var_k + eps)

M_k z_k is never formed: with the mean m and the covariance S of z, mean = M m and var = diag(M S M'), so y is one
matrix product more, sum_k A_k z_k + const with A_k = w_k diag(var_k + eps)^-1/2 M_k, and only z has to be kept. For
the gradient let g = dL/dy, R = sum over pixels of g (z - m)' and v = diag(M R'):

    dL/dw  = v / sqrt(var + eps), summed over the channels that share w
    dL/dM  = diag(w) diag(var + eps)^-1/2 R - n diag(c) M S      with c = w v (var + eps)^-3/2 / n, for n pixels
    dL/dz  = A' g - M' diag(c) M (z - m) - (mean over the pixels of A' g)

w is an operation's weight in a search cell, and BN's own weight in the augment network. The sums over pixels are put
together in float64 (by native.c): variances are differences of such sums.
"""

import torch

from models.fast import native
from models.fast.modules import is_synced
from models.sync_bn import refuse_second_derivatives, sum_over_ranks


def normalised_product(z, weight, bn):
    """bn of the pointwise convolution of z with weight, (C, K, 1, 1), as in training; its running statistics move."""
    mean, var, y = Mixture.apply(bn.eps, is_synced(bn), 1, bn.weight, bn.bias, weight, z)
    if bn.track_running_stats:
        with torch.no_grad():
            bn.running_mean.lerp_(mean[0], bn.momentum)
            bn.running_var.lerp_(var[0], bn.momentum)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
    return y


class Mixture(torch.autograd.Function):
    """y = base + bias + sum of w BN(M z) over the products of each of E edges, keeping the z alone.

    The products of edge e are e, e + E, ...; with E = products, nothing is summed. M: (products, C, K), or of one
    convolution its weight (C, K, 1, 1); w: (products,), or of one convolution (C,), or None; bias: (E * C,), or None;
    then each product's z, (N, K, h, w), and each edge's base, (N, C, h, w), if any. Returns the means and unbiased
    variances of M z, (products, C), and each edge's y, (N, C, h, w). synced: over the pixels of all ranks; what w, bias
    and M get is this rank's part.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, eps, synced, edges, w, bias, M, *tensors):
        count = _number_of_products(M)
        images, bases = tensors[:count], tensors[count:]
        ctx.save_for_backward(w, bias, M, *images)
        ctx.set_materialize_grads(False)
        n = images[0].numel() // images[0].shape[1]
        if n < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel: a larger batch")
        sums, grams = native.products(images, images)
        if synced:
            sums, grams, n = _sums_over_ranks(sums, grams, sums.new_tensor(float(n)))
        rows = _with_rows(M, w, bias, edges)
        A, shifts, mean, var, moments = native.fold(sums, grams, float(n), *rows, eps, edges)
        terms = [(images[i : i + edges], A[i : i + edges]) for i in range(0, count, edges)]
        ys = native.mix(terms, list(bases), shifts)
        ctx.options = synced, edges, float(n), moments, bool(bases)
        ctx.mark_non_differentiable(mean, var)
        return mean, var, *ys

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, _, __, *gs):
        refuse_second_derivatives()
        w, bias, M, *images = ctx.saved_tensors
        synced, edges, n, moments, has_bases = ctx.options
        _, _, _, wants_w, wants_bias, wants_M, *wants_z = ctx.needs_input_grad
        N, _, *size = images[0].shape
        gs = [images[0].new_zeros(N, M.shape[-2 if M.dim() == 3 else 0], *size) if g is None else g for g in gs]
        gs_of_products = [g.contiguous(memory_format=torch.channels_last) for g in gs] * (len(images) // edges)
        sums, products = native.products(gs_of_products, images)
        rows, wants_z = _with_rows(M, w, bias, edges)[:2], any(wants_z[: len(images)])
        dw, dM, *for_z = native.fold_gradients(
            sums, products, n, *rows, moments, wants_w, wants_M, wants_z and not synced
        )
        dbias = sums[:edges].to(M.dtype).view_as(bias) if wants_bias else None
        dzs = [None] * len(images)
        if wants_z:
            if synced:
                sums, products = _sums_over_ranks(sums, products)
                _, _, *for_z = native.fold_gradients(sums, products, n, *rows, moments, False, False, True)
            A, D, shift = for_z
            dzs = native.mix([(gs_of_products, A), (images, D)], shifts=shift)
        dw, dM = dw.view_as(w) if wants_w else None, dM.view_as(M) if wants_M else None
        return None, None, None, dw, dbias, dM, *dzs, *(gs if has_bases else [])


def _number_of_products(M):
    return len(M) if M.dim() == 3 else 1


def _with_rows(M, w, bias, edges):
    """M, w and bias with a row for each product or edge, as `native.fold` takes them."""
    M = M if M.dim() == 3 else M[None, :, :, 0, 0]
    return M, w if w is None else w.view(len(M), -1), bias if bias is None else bias.view(edges, -1)


def _sums_over_ranks(*tensors):
    """The sums over the ranks, by one message."""
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
