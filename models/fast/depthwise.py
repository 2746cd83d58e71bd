"""Depthwise convolutions of channels-last CPU images in C, and views whose gradients have the strides of the images.

PyTorch's depthwise convolution (oneDNN) is fast on such images in the forward pass and, at dilation 1, for the gradient
of x. Other gradients take 5 to 100 times longer than the arithmetic needs. native.c computes all of them, for many
images and convolutions in one call. At stride 1 the gradient of x is the convolution of dz with the kernel rotated by
180 degrees, with the same dilation. At a larger stride, zeros are first inserted between the pixels of dz.
"""

import torch

from models.fast import native
from models.sync_bn import refuse_second_derivatives


def convolve(images, relus, kernels, convolutions):
    """Several depthwise convolutions in one call: a tuple of their outputs. Arguments: see `native.depthwise`."""
    return _Depthwise.apply(relus, convolutions, len(images), *images, *kernels)


def pixels_read(stride, padding, dilation):
    """Whether a convolution reads only every second pixel, and its settings on the pixels that it reads.

    With stride 2, dilation 2 and even padding it reads only every second row and column. On the image of those it has
    stride 1 and dilation 1. Returns (whether it is so, (stride, padding, dilation) on the pixels that are read).
    """
    reads_every_second = stride == dilation == 2 and padding % 2 == 0
    return reads_every_second, (1, padding // 2, 1) if reads_every_second else (stride, padding, dilation)


def dense_gradient(x):
    """x, with a gradient that has the strides of x: a slice of a larger gradient would slow down the backward pass."""
    return _DenseGradient.apply(x)


def every_second(x, first=0):
    """x[..., first::2, first::2] as a dense tensor, with a gradient that has the strides of x."""
    return dense_gradient(x)[..., first::2, first::2].clone()


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
