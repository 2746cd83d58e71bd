"""Depthwise convolution with a backward pass that is fast on the CPU.

PyTorch's own (oneDNN's) is fast there for channels-last images, forward and, at dilation 1, for the gradient of x; the
rest takes 5 to 100 times longer than the same arithmetic needs. native.c has all of it, for many images and
convolutions at once. The gradient of x is, at stride 1, the convolution of dz with the kernel turned by 180 degrees,
dilated alike; at a larger stride dz has zeros between its pixels first.
"""

import torch
from torch import nn

from models.fast import native, remake


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


def channels_last_depthwise(x, weight, stride, padding, dilation, relu=False):
    """The convolution of channels-last CPU images x, (N, C, H, W), or of relu(x), with weight, (C, 1, k, k)."""
    if is_subsampling(stride, padding, dilation):
        x, stride, padding, dilation = every_second(x), 1, padding // 2, 1
    return channels_last_depthwises([x], [relu], [weight], [(0, 0, 0, (stride, padding, dilation))])[0]


def is_subsampling(stride, padding, dilation):
    """Whether a convolution reads every second pixel alone, so that on those it has stride 1 and dilation 1."""
    return stride == dilation == 2 and padding % 2 == 0


def channels_last_depthwises(images, relus, kernels, convolutions):
    """Several convolutions as one step, a tuple of their outputs: `native.depthwise` of channels-last CPU images."""
    return _ChannelsLast.apply(relus, convolutions, len(images), *images, *kernels)


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
    def forward(ctx, relus, convolutions, n, *images_and_kernels):
        ctx.save_for_backward(*images_and_kernels)
        ctx.about = relus, convolutions, n
        ctx.set_materialize_grads(False)

        def make(*tensors):
            return native.depthwise(tensors[:n], relus, tensors[n:], convolutions)

        zs = make(*images_and_kernels)
        remake.can_be_made(zs, make, images_and_kernels)
        return tuple(zs)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *dzs):
        relus, convolutions, n = ctx.about
        tensors, (_, _, _, *wanted) = ctx.saved_tensors, ctx.needs_input_grad
        given = [i for i, dz in enumerate(dzs) if dz is not None]
        gradients = native.plain_depthwise_gradients if torch.is_grad_enabled() else native.depthwise_gradients
        dimages, dkernels = gradients(
            tensors[:n], relus, tensors[n:], [convolutions[i] for i in given], [dzs[i] for i in given],
            wanted[:n], wanted[n:],
        )  # fmt: skip
        return None, None, None, *dimages, *dkernels
