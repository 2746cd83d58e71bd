"""Depthwise convolution with a backward pass that is fast on the CPU.

PyTorch's own (oneDNN's) is fast there for channels-last images, forward and, at dilation 1, for the input's gradient;
the rest takes 5 to 100 times longer than the same arithmetic needs. With x the input, w the kernel, z the output and dz
its gradient, this module uses three identities, each exact for any size:

- stride 1: dx is the convolution of dz with w turned by 180 degrees, dilated alike;
- dw of a kernel wider than 3 is put together from column blocks of at most 3, each with x or dz padded to match;
- dilation d, stride 1: with rows and columns sorted by their remainder modulo d, the neighbours are smaller images with
  dilation 1. Dilation 2 at stride 2 is dilation 1, stride 1 on x[::2, ::2].

At a few pixels an image a convolution is a matrix, as everything linear is: z = x T(w), with T(w) of (pixels in) x
(pixels out) for each channel, and all channels are one batched product.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

WIDEST = 3  # kernel columns for which oneDNN has a fast weight gradient
FEW_PIXELS = 64  # in an image: up to here a product with a matrix is as fast on the CPU, and the weight gradient faster


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a channel a group, square odd kernel, 'same' padding and no bias; faster on channels-last CPU
    images, and the same numbers."""

    def __init__(self, C, kernel_size, stride, padding, dilation=1):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x):
        if is_channels_last_on_cpu(x):
            return channels_last_depthwise(x, self.weight, self.stride[0], self.padding[0], self.dilation[0])
        return super().forward(x)


def is_channels_last_on_cpu(x):
    return x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def channels_last_depthwise(x, weight, stride, padding, dilation):
    """The convolution of channels-last CPU images x, (N, C, H, W), with weight, (C, 1, k, k)."""
    if stride == dilation == 2 and padding % 2 == 0:
        x, stride, padding, dilation = every_second(x), 1, padding // 2, 1
    return channels_last_depthwises(x, [(weight, (stride, padding, dilation))])[0]


def channels_last_depthwises(x, convolutions, watch=None):
    """Several convolutions of x: a tuple of their outputs.

    convolutions: pairs of a weight and its (stride, padding, dilation); watch: called with each output while it is
    still in the cache, outside of differentiation.
    """
    weights, geometries = zip(*convolutions)
    return _ChannelsLast.apply(x, geometries, watch, *weights)


def dense_gradient(x):
    """x, whose gradient lies in memory as x does: a part of a larger gradient would slow down all that follows."""
    return _DenseGradient.apply(x)


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.like = x.shape, x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g if g.stride() == ctx.like[1] else g.new_empty_strided(*ctx.like).copy_(g)


def every_second(x, first=0):
    """x[..., first::2, first::2], whose gradient lies in memory as x does; a slice's would be contiguous."""
    return _EverySecond.apply(x, first)


class _EverySecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first):
        ctx.first, ctx.like = first, (x.shape, x.stride())
        return x[..., first::2, first::2].clone()  # dense, in the order of x

    @staticmethod
    def backward(ctx, g):
        shape, stride = ctx.like
        dx = g.new_empty_strided(shape, stride).zero_()
        dx[..., ctx.first :: 2, ctx.first :: 2] = g
        return dx, None


class _ChannelsLast(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, geometries, watch, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.geometries = geometries
        ctx.set_materialize_grads(False)
        zs = []
        for weight, geometry in zip(weights, geometries):
            zs.append(F.conv2d(x, weight, None, *geometry, len(weight)))
            if watch:
                watch(zs[-1])
        return tuple(zs)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *dzs):
        x, *weights = ctx.saved_tensors
        wants_x, _, _, *wants_weights = ctx.needs_input_grad
        dx, dweights = None, [None] * len(weights)
        for i, (g, weight, geometry) in enumerate(zip(dzs, weights, ctx.geometries)):
            if g is None:
                continue
            dz = g.contiguous(memory_format=torch.channels_last)
            if wants_x:
                part = input_gradient(dz, x, weight, *geometry)
                dx = part if dx is None else dx + part if torch.is_grad_enabled() else dx.add_(part)
            if wants_weights[i]:
                dweights[i] = weight_gradient(dz, x, weight, *geometry)
        return dx, None, None, *dweights


def input_gradient(dz, x, weight, stride, padding, dilation):
    """dL/dx of the convolution."""
    if stride != 1:
        return _builtin(dz, x, weight, stride, padding, dilation, (True, False))[0]
    turned = dilation * (weight.shape[-1] - 1) - padding
    return F.conv2d(dz, weight.flip(2, 3), None, 1, turned, dilation, len(weight))


def weight_gradient(dz, x, weight, stride, padding, dilation):
    """dL/dweight of the convolution."""
    k = weight.shape[-1]
    if x.shape[2:].numel() <= FEW_PIXELS and (k > WIDEST or dilation > 1 or min(x.shape[2:]) < k):
        taps, _, _ = _taps(*x.shape[2:], weight.shape[-1], stride, padding, dilation, x.dtype)
        return _dense_weight_gradient(_channel_major(dz), _channel_major(x), taps).view_as(weight)
    if dilation > 1:
        if stride != 1 or padding % dilation:
            return _builtin(dz, x, weight, stride, padding, dilation, (False, True))[1]
        split_weight = weight.repeat(dilation, 1, 1, 1)
        split = weight_gradient(_split(dz, dilation), _split(x, dilation), split_weight, 1, padding // dilation, 1)
        return split.unflatten(0, (dilation, -1)).sum(0)
    if k <= WIDEST:
        return _builtin(dz, x, weight, stride, padding, dilation, (False, True))[1]
    if k == 5 and stride == 1 and x.shape[3] % 2 == 0:
        # columns -1, 0, 1, and then -2, 0, 2: even and odd columns apart, as channels, which lie side by side in memory
        inner = _builtin(dz, x, weight.new_empty(len(weight), 1, k, 3), 1, (padding, 1), 1, (False, True))[1]
        dz, x = (_columns_apart(t) for t in (dz, x))
        outer = _builtin(dz, x, weight.new_empty(2 * len(weight), 1, k, 3), 1, (padding, 1), 1, (False, True))[1]
        outer = outer.unflatten(0, (2, -1)).sum(0)
        return torch.cat([outer[..., :1], inner, outer[..., 2:]], dim=3)
    blocks = []
    for first in range(0, k, WIDEST):
        # columns [first, first + width) of the kernel; output o reads x at o * stride + column - padding
        width = min(WIDEST, k - first)
        left = padding - first  # zero columns that x needs at its left, a negative number to cut
        shifted = F.pad(x, (left, (dz.shape[3] - 1) * stride + width - left - x.shape[3]))
        shape = (len(weight), 1, k, width)
        blocks.append(_builtin(dz, shifted, weight.new_empty(shape), stride, (padding, 0), 1, (False, True))[1])
    return torch.cat(blocks, dim=3)


def _columns_apart(x):
    """(N, C, H, W) -> (N, 2 * C, H, W / 2), channels-last: the even columns' channels, then the odd ones'."""
    return x.permute(0, 2, 3, 1).flatten(2).unflatten(2, (x.shape[3] // 2, -1)).permute(0, 3, 1, 2)


def _builtin(dz, x, weight, stride, padding, dilation, wanted):
    """PyTorch's (dx, dweight), None for what is not wanted."""
    padding = [padding, padding] if isinstance(padding, int) else list(padding)
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, [stride] * 2, padding, [dilation] * 2, False, [0, 0], len(weight), [*wanted, False]
    )[:2]


def _split(x, d):
    """(N, C, H, W) -> (N * d, d * C, ceil(H / d), ceil(W / d)), channels-last: pixels by their remainders modulo d.

    A row's remainder goes to the batch, a column's to the channels, which costs nothing, since they lie side by side.
    Zeros fill up a size that d does not divide: as gradients they count for nothing, as pixels they are padding.
    """
    H, W = x.shape[2:]
    if H % d or W % d:
        x = F.pad(x, (0, -W % d, 0, -H % d))
    x = x.permute(0, 2, 3, 1).flatten(2).unflatten(1, (-1, d))  # N, H / d, d, W * C
    return x.transpose(1, 2).flatten(0, 1).unflatten(2, (-(-W // d), -1)).permute(0, 3, 1, 2)


def dense_depthwise(x, weight, stride, padding, dilation):
    """The convolution of x, (C, N, H, W), with weight, (C, k, k), as a product with a matrix for each channel.

    Returns (C, N, ceil(H / stride), ceil(W / stride)). For images of few pixels: the work grows with their square.
    """
    taps, H, W = _taps(*x.shape[2:], weight.shape[-1], stride, padding, dilation, x.dtype)
    return _Dense.apply(x.flatten(2), weight.flatten(1), taps).unflatten(2, (H, W))


class _Dense(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, weight, taps):
        ctx.save_for_backward(x, weight, taps)
        return x @ _matrices(weight, taps)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, dz):
        x, weight, taps = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dz @ _matrices(weight, taps).mT
        if ctx.needs_input_grad[1]:
            dweight = _dense_weight_gradient(dz, x, taps)
        return dx, dweight, None


def _channel_major(x):
    """(N, C, H, W) -> (C, N, H * W)."""
    return x.transpose(0, 1).flatten(2).contiguous()


def _dense_weight_gradient(dz, x, taps):
    """(C, k * k), the part of dL/dT(w) = x' dz that each tap has in T(w)."""
    return (x.mT @ dz).flatten(1) @ taps.flatten(1).T


def _matrices(weight, taps):
    """T(w): (C, pixels in, pixels out) from (C, k * k)."""
    return (weight @ taps.flatten(1)).unflatten(1, taps.shape[1:])


@functools.lru_cache(maxsize=256)
def _taps(H, W, k, stride, padding, dilation, dtype):
    """Zeros and ones, (k * k, pixels in, pixels out): which input each tap reads for each output; the output's size."""

    def one_way(size):
        out = (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        reads = torch.arange(out)[None] * stride + torch.arange(k)[:, None] * dilation - padding  # tap, output
        return (reads[:, None] == torch.arange(size)[:, None]).to(dtype), out  # tap, input, output

    rows, H_out = one_way(H)
    columns, W_out = one_way(W)
    taps = torch.einsum("iyv,jxu->ijyxvu", rows, columns)
    return taps.reshape(k * k, H * W, H_out * W_out), H_out, W_out
