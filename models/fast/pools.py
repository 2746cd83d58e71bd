"""Pooling that keeps less for the gradient."""

import torch
import torch.nn.functional as F
from torch import nn


def pooling(pool):
    """The pooling of a module, as a function."""
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
        ctx.geometry, ctx.layout = geometry, (x.shape, x.stride())
        return y

    @staticmethod
    def backward(ctx, g):
        (places,) = ctx.saved_tensors
        like_x = g.new_empty_strided(*ctx.layout)  # its values are not read
        gradient = torch.ops.aten.max_pool2d_with_indices_backward
        return gradient(g, like_x, *ctx.geometry, False, places.long()), None, None, None, None


class _AvgPool(torch.autograd.Function):
    """`F.avg_pool2d`, keeping nothing instead of the input."""

    @staticmethod
    def forward(ctx, x, *geometry):
        ctx.geometry, ctx.layout = geometry, (x.shape, x.stride())
        return F.avg_pool2d(x, *geometry)

    @staticmethod
    def backward(ctx, g):
        like_x = g.new_empty_strided(*ctx.layout)  # its values are not read
        return torch.ops.aten.avg_pool2d_backward(g, like_x, *ctx.geometry), *[None] * len(ctx.geometry)
