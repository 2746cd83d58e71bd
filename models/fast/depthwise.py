"""Depthwise convolutions of channels-last CPU images in C, and views whose gradients lie in memory as the images do.

PyTorch's own depthwise convolution (oneDNN's) is fast there forward and, at dilation 1, for the gradient of x; the rest
takes 5 to 100 times longer than the same arithmetic needs. native.c does all of it, for many images and convolutions at
once. The gradient of x is, at stride 1, the convolution of dz with the kernel turned by 180 degrees, dilated alike; at
a larger stride dz has zeros between its pixels first.
"""

import torch

from models.fast import native
from models.sync_bn import refuse_second_derivatives


def convolve(images, relus, kernels, convolutions):
    """Several depthwise convolutions as one step, a tuple of their outputs; see `native.depthwise`."""
    return _Depthwise.apply(relus, convolutions, len(images), *images, *kernels)


def pixels_read(stride, padding, dilation):
    """How a convolution of stride 2 and dilation 2 reads every second pixel alone: on those, with these settings.

    Returns whether it does, and (stride, padding, dilation) on the pixels that it reads.
    """
    reads_every_second = stride == dilation == 2 and padding % 2 == 0
    return reads_every_second, (1, padding // 2, 1) if reads_every_second else (stride, padding, dilation)


def dense_gradient(x):
    """x, whose gradient lies in memory as x does: a part of a larger gradient would slow down all that follows."""
    return _DenseGradient.apply(x)


def every_second(x, first=0):
    """x[..., first::2, first::2], whose gradient lies in memory as x does; a slice's would be contiguous."""
    return _EverySecond.apply(x, first)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, relus, convolutions, n, *images_and_kernels):
        ctx.save_for_backward(*images_and_kernels)
        ctx.options = relus, convolutions, n
        ctx.set_materialize_grads(False)
        return tuple(native.depthwise(images_and_kernels[:n], relus, images_and_kernels[n:], convolutions))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *dzs):
        refuse_second_derivatives()
        relus, convolutions, n = ctx.options
        tensors, (_, _, _, *wanted) = ctx.saved_tensors, ctx.needs_input_grad
        used = [i for i, dz in enumerate(dzs) if dz is not None]
        dimages, dkernels = native.depthwise_gradients(
            tensors[:n],
            relus,
            tensors[n:],
            [convolutions[i] for i in used],
            [dzs[i] for i in used],
            wanted[:n],
            wanted[n:],
        )
        return None, None, None, *dimages, *dkernels


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.layout = x.shape, x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        shape, stride = ctx.layout
        return g if g.stride() == stride else g.new_empty_strided(shape, stride).copy_(g)


class _EverySecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first):
        ctx.first, ctx.layout = first, (x.shape, x.stride())
        return x[..., first::2, first::2].clone()  # dense, in the order of x

    @staticmethod
    def backward(ctx, g):
        shape, stride = ctx.layout
        dx = g.new_empty_strided(shape, stride).zero_()
        dx[..., ctx.first :: 2, ctx.first :: 2] = g
        return dx, None
