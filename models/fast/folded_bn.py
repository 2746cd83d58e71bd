"""One operation for pointwise convolutions, their BN and the weighted sum of the results, for the CPU.

Let z_k be an input as a matrix (K, pixels) and M_k the pointwise weights (C, K). With mean and variance over pixels,

    y = sum_k w_k (M_k z_k - mean_k) / sqrt(var_k + eps)

M_k z_k is never computed. Let m be the mean and S the covariance of z. Then mean = M m and var = diag(M S M'), so that
y = sum_k A_k z_k + const with A_k = w_k diag(var_k + eps)^-1/2 M_k, which takes one matrix product for each k, and only
z is saved for the backward pass. For the gradient let g = dL/dy, R = sum over pixels of g (z - m)' and v = diag(M R'):

    dL/dw  = v / sqrt(var + eps), summed over the channels that share w
    dL/dM  = diag(w) diag(var + eps)^-1/2 R - n diag(c) M S      with c = w v (var + eps)^-3/2 / n, for n pixels
    dL/dz  = A' g - M' diag(c) M (z - m) - (mean over the pixels of A' g)

In a search cell w is the weight of a candidate, in the augment network it is the weight parameter of BN. native.c adds
the sums over pixels in float64, since variances are differences of such sums.
"""

import torch
from torch import nn

from models.fast import native
from models.fast.modules import is_synced
from models.sync_bn import refuse_second_derivatives, sum_over_ranks


def normalised_product(z: torch.Tensor, weight: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """bn(conv(z)) in training, with the pointwise weight (C, K, 1, 1); updates the running statistics of bn."""
    w, bias = (values if values is None else values.unsqueeze(0) for values in (bn.weight, bn.bias))
    mean, var, y = Mixture.apply(bn.eps, is_synced(bn), 1, w, bias, weight.flatten(1).unsqueeze(0), z)
    if bn.track_running_stats:
        with torch.no_grad():
            bn.running_mean.lerp_(mean[0], bn.momentum)
            bn.running_var.lerp_(var[0], bn.momentum)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.add_(1)
    return y


class Mixture(torch.autograd.Function):
    """For each of E edges y = base + bias + sum of w BN(M z) over the products of the edge; saves only the z.

    The products of edge e have the indices e, e + E, ...; if there are E products, each edge has one.

    synced: BN uses the pixels of all ranks; the gradients of w, bias and M are this rank's part
    w: (products, 1) or (products, C), or None; bias: (E, C) or None; M: (products, C, K)
    tensors: the z of each product, (N, K, h, w), and then the base of each edge, (N, C, h, w), if there are bases

    Returns the means and unbiased variances of M z, (products, C), and the y of each edge, (N, C, h, w).
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, eps, synced, edges, w, bias, M, *tensors):
        images, bases = tensors[: len(M)], tensors[len(M) :]
        ctx.save_for_backward(w, M, *images)
        ctx.set_materialize_grads(False)
        n = images[0].numel() // images[0].shape[1]
        if n < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel: a larger batch")
        sums, grams = native.products(images, images)
        if synced:
            sums, grams, n = _sums_over_ranks(sums, grams, sums.new_tensor(float(n)))
        A, shifts, mean, var, moments = native.fold(sums, grams, float(n), M, w, bias, eps, edges)
        terms = [(images[i : i + edges], A[i : i + edges]) for i in range(0, len(M), edges)]
        ys = native.mix(terms, list(bases), shifts)
        ctx.options = synced, edges, float(n), moments, bool(bases)
        ctx.mark_non_differentiable(mean, var)
        return mean, var, *ys

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, _, __, *gs):
        refuse_second_derivatives()
        w, M, *images = ctx.saved_tensors
        synced, edges, n, moments, has_bases = ctx.options
        _, _, _, wants_w, wants_bias, wants_M, *wants_z = ctx.needs_input_grad
        N, _, *size = images[0].shape
        gs = [images[0].new_zeros(N, M.shape[1], *size) if g is None else g for g in gs]
        gs_of_products = [g.contiguous(memory_format=torch.channels_last) for g in gs] * (len(images) // edges)
        sums, products = native.products(gs_of_products, images)
        wants_z = any(wants_z[: len(images)])
        dw, dM, *for_z = native.fold_gradients(
            sums, products, n, M, w, moments, wants_w, wants_M, wants_z and not synced
        )
        dbias = sums[:edges].to(M.dtype) if wants_bias else None
        dzs = [None] * len(images)
        if wants_z:
            if synced:
                sums, products = _sums_over_ranks(sums, products)
                _, _, *for_z = native.fold_gradients(sums, products, n, M, w, moments, False, False, True)
            A, D, shift = for_z
            dzs = native.mix([(gs_of_products, A), (images, D)], shifts=shift)
        return None, None, None, dw, dbias, dM, *dzs, *(gs if has_bases else [])


def _sums_over_ranks(*tensors):
    """The sums of the tensors over the ranks, with one all-reduce."""
    flat = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
