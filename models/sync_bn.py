"""Batch normalisation with the statistics of the global batch, whose rows are spread over the ranks.

`nn.SyncBatchNorm` works on CUDA only. This works on any device, and the fused execution of the search cell can use it,
by `batch_norm`. As with `nn.SyncBatchNorm`, gradients are those of the sum of all ranks' losses, since one rank's rows
change the statistics that normalise the others'.
"""

import torch
import torch.distributed as dist
from torch import nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that normalises by the statistics of the global batch in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var = batch_norm(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return y


def synchronise(net: nn.Module) -> None:
    """Make all BN layers of a network use the statistics of the global batch.

    This is done on one rank too, where the result differs only by rounding. A rounding error can switch a ReLU near
    zero, and eq. 7 amplifies such a difference. So searches on different numbers of ranks agree only if the arithmetic
    is the same.
    """
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


def batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BN of x, (N, C, ...), by the statistics over all ranks: (y, mean, unbiased variance).

    weight, bias: (C,) or None. If the batch is so small that every rank has all of it (see `ranks.rows`), the unbiased
    variance counts each value once per rank.
    """
    return _SyncedBatchNorm.apply(x, weight, bias, eps)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place. Autograd does not record it."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def refuse_second_derivatives() -> None:
    """Raise RuntimeError if this is called in a backward pass with create_graph=True.

    For functions that can be differentiated only once. PyTorch's `once_differentiable` would not raise: `autograd.grad`
    would silently leave out their part of the second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused execution and BN over ranks can be differentiated once; second derivatives need "
            "execution='plain', without --sync-bn"
        )


class _SyncedBatchNorm(torch.autograd.Function):
    """Sums over ranks are in float64, since a variance is a difference of such sums."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dtype, over = x.dtype, [i for i in range(x.dim()) if i != 1]
        var, mean = (part.double() for part in torch.var_mean(_precise(x), over, correction=0))
        n = x.numel() // x.shape[1]
        sums = sum_over_ranks(torch.cat([n * mean, n * (var + mean.square()), mean.new_full((1,), n)]))
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
    """Reshape values, (C,), so that they broadcast over x, (N, C, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _precise(x):
    """x in float32 if it is bfloat16 or float16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
