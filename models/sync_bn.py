"""Batch normalisation by the statistics of the global batch, its rows spread over the ranks.

`nn.SyncBatchNorm` is for CUDA alone; this is for any device and, by `batch_norm`, for the fused execution of the search
cell too. The losses of all ranks together are differentiated: a gradient that depends on another rank's rows through
the statistics is that of the ranks' sum, as with `nn.SyncBatchNorm`.
"""

import torch
import torch.distributed as dist
from torch import nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are the global batch's."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var = batch_norm(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y


def synchronise(net):
    """Let all BN of a network use the global batch's statistics.

    On one rank too, where they are the same but for rounding: a ReLU near zero takes another branch for a rounding, and
    eq. 7 amplifies that, so that only the same arithmetic on any number of ranks makes their searches alike.
    """
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


def batch_norm(x, weight, bias, eps):
    """(y, mean, var): BN of x, (N, C, ...), by the statistics over all ranks; var is the unbiased one.

    weight, bias: (C,) or None. Where a batch too small to share goes to every rank as a whole, var counts each value
    once per rank.
    """
    return _SyncedBatchNorm.apply(x, weight, bias, eps)


def sum_over_ranks(tensor):
    """The sum over the ranks, in place; a tensor that autograd does not see."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def refuse_second_derivatives():
    """Raise RuntimeError in a backward pass whose graph is to be kept, of a step that can be differentiated once only.

    PyTorch's `once_differentiable` lets `autograd.grad` leave out such a step's part without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused execution and BN over ranks can be differentiated once; second derivatives need "
            "execution='plain', without --sync-bn"
        )


class _SyncedBatchNorm(torch.autograd.Function):
    """Sums over ranks in float64: a variance is a difference of them."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dtype, over = x.dtype, [i for i in range(x.dim()) if i != 1]
        var, mean = (part.double() for part in torch.var_mean(_precise(x), over, correction=0))
        n = x.numel() // x.shape[1]
        sums = sum_over_ranks(torch.cat([n * mean, n * (var + mean.square()), mean.new_tensor([n])]))
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        var = (square - mean.square()).clamp_(min=0)
        inverse = (var + eps).rsqrt()
        unbiased = var * (total / (total - 1).clamp(min=1))
        ctx.save_for_backward(x, weight, mean, inverse, total)
        x = _precise(x)
        mean, inverse, unbiased = (part.to(x.dtype) for part in (mean, inverse, unbiased))
        y = (x - _across(mean, x)) * _across(inverse if weight is None else inverse * weight, x)
        y = y if bias is None else y + _across(bias, x)
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(dtype), mean, unbiased

    @staticmethod
    def backward(ctx, g, _, __):
        refuse_second_derivatives()
        x, weight, mean, inverse, total = ctx.saved_tensors
        dtype, x, g = x.dtype, _precise(x), _precise(g)
        mean, inverse = mean.to(x.dtype), inverse.to(x.dtype)
        over = [i for i in range(x.dim()) if i != 1]
        normalised = (x - _across(mean, x)) * _across(inverse, x)
        sums = torch.stack([g.sum(over), (g * normalised).sum(over)])
        dx, dweight = None, None if weight is None else sums[1]
        if ctx.needs_input_grad[0]:
            means = (sum_over_ranks(sums.to(torch.float64, copy=True)) / total).to(x.dtype)
            dx = g - _across(means[0], x) - normalised * _across(means[1], x)
            dx = (dx * _across(inverse if weight is None else inverse * weight, x)).to(dtype)
        return dx, dweight, sums[0] if ctx.needs_input_grad[2] else None, None


def _across(values, x):
    """(C,) to be multiplied by x, (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _precise(x):
    """x in float32 where it has fewer digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
