"""Depthwise convolution with a backward pass that is fast on the CPU.

PyTorch's own (oneDNN's) is fast there for channels-last images, forward and, at dilation 1, for the gradient of x; the
rest takes 5 to 100 times longer than the same arithmetic needs. native.c has all of it, for all convolutions of an
image at once. The gradient of x is, at stride 1, the convolution of dz with the kernel turned by 180 degrees, dilated
alike; at a larger stride dz has zeros between its pixels first.

At a few pixels an image a convolution is a matrix, as everything linear is: z = x T(w), with T(w) of (pixels in) x
(pixels out) for each channel, and all channels are one batched product.
"""

import functools

import torch
from torch import nn

from models import native, remake

FEW_PIXELS = 64  # in an image: up to here a product with a matrix is as fast on the CPU


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
    """Whether native.c can read x as images: not where an exporter or compiler only follows what is done to it."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def channels_last_depthwise(x, weight, stride, padding, dilation):
    """The convolution of channels-last CPU images x, (N, C, H, W), with weight, (C, 1, k, k)."""
    if stride == dilation == 2 and padding % 2 == 0:
        x, stride, padding, dilation = every_second(x), 1, padding // 2, 1
    return channels_last_depthwises(x, [(weight, (stride, padding, dilation))])[0]


def channels_last_depthwises(x, convolutions, relu=False):
    """Several convolutions of x, or with `relu` of relu(x): a tuple of their outputs.

    convolutions: pairs of a weight and its (stride, padding, dilation).
    """
    weights, geometries = zip(*convolutions)
    return _ChannelsLast.apply(x, relu, geometries, *weights)


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
    def forward(ctx, x, relu, geometries, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.relu, ctx.geometries = relu, geometries
        ctx.set_materialize_grads(False)

        def make(x, *weights):
            return native.depthwise(x, relu, list(zip(weights, geometries)))

        zs = make(x, *weights)
        remake.can_be_made(zs, make, [x, *weights])
        return tuple(zs)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *dzs):
        x, *weights = ctx.saved_tensors
        wants_x, _, _, *wants_weights = ctx.needs_input_grad
        given = [i for i, dz in enumerate(dzs) if dz is not None]
        gradients = native.plain_depthwise_gradients if torch.is_grad_enabled() else native.depthwise_gradients
        convolutions = [(weights[i], ctx.geometries[i]) for i in given]
        wanted = wants_x, [wants_weights[i] for i in given]
        dx, found = gradients(x, ctx.relu, convolutions, [dzs[i] for i in given], *wanted)
        dweights = dict(zip(given, found))
        return dx, None, None, *map(dweights.get, range(len(weights)))


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
