"""Depthwise convolutions of channels-last CPU images by C code; views whose gradients have the strides of the images.

PyTorch's depthwise convolution (oneDNN) is fast on such images in the forward pass and, at dilation 1, for the gradient
of x. Other gradients take 5 to 100 times longer than the arithmetic needs. native.c computes all of them, for many
images and convolutions in one call. At stride 1 the gradient of x is the convolution of dz with the kernel rotated by
180 degrees, with the same dilation. At a larger stride, zeros are first inserted between the pixels of dz.
"""

import itertools

import torch

from models.fast import native
from models.sync_bn import refuse_second_derivatives


def convolve(images, kernels, convolutions):
    """Several depthwise convolutions of ReLUs in one call: a tuple. Arguments: see `native.depthwise`."""
    return _Depthwise.apply(convolutions, len(images), *images, *kernels)


def dense_gradient(x):
    """x, with a gradient that has the strides of x: a slice of a larger gradient would slow down the backward pass."""
    return _DenseGradient.apply(x)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, convolutions, n, *images_and_kernels):
        ctx.save_for_backward(*images_and_kernels)
        ctx.options = convolutions, n
        ctx.set_materialize_grads(False)
        return tuple(native.depthwise(images_and_kernels[:n], images_and_kernels[n:], convolutions))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *dzs):
        refuse_second_derivatives()
        convolutions, n = ctx.options
        tensors, (_, _, *wanted) = ctx.saved_tensors, ctx.needs_input_grad
        used = [i for i, dz in enumerate(dzs) if dz is not None]
        convolutions, dzs = [convolutions[i] for i in used], [dzs[i] for i in used]
        gradients = native.depthwise_gradients(tensors[:n], tensors[n:], convolutions, dzs, wanted[:n], wanted[n:])
        return None, None, *itertools.chain(*gradients)


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.layout = x.shape, x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        shape, stride = ctx.layout
        return g if g.stride() == stride else g.new_empty_strided(shape, stride).copy_(g)
