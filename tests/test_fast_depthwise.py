"""Depthwise convolution and its gradients against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from models.fast import native
from models.fast.depthwise import convolve, dense_gradient, every_second, pixels_read

needs_compiler = pytest.mark.skipif(not native.knows(torch.float32), reason="needs a C compiler")


def channels_last(x, weight, *geometry):
    """The convolution in C, on the pixels that it reads."""
    reads_every_second, settings = pixels_read(*geometry)
    x = x.contiguous(memory_format=torch.channels_last)
    (z,) = convolve([every_second(x) if reads_every_second else x], [False], [weight], [(0, 0, 0, settings)])
    return z


def output_and_gradients(function, x, weight):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    z = function(x, weight)
    towards = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    return z, *torch.autograd.grad(z, (x, weight), towards)


@needs_compiler
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (7, 7), (8, 8), (9, 13), (16, 10)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_it_is_pytorchs_convolution(k, dilation, stride, size):
    torch.manual_seed(0)
    geometry = stride, dilation * (k // 2), dilation
    for C in (1, 5, 16):
        x, weight = torch.randn(3, C, *size, dtype=torch.float64), torch.randn(C, 1, k, k, dtype=torch.float64)
        expected = output_and_gradients(lambda x, w, C=C: F.conv2d(x, w, None, *geometry, C), x, weight)
        found = output_and_gradients(lambda x, w: channels_last(x, w, *geometry), x, weight)
        for a, b in zip(found, expected):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("C", [1, 2, 3, 5, 7, 9, 12, 17, 36])
@pytest.mark.parametrize(
    ("k", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 1), (3, 1, 2), (5, 2, 2)]
)
def test_float32_kernels_are_right_at_any_number_of_channels(k, stride, dilation, C):
    torch.manual_seed(0)
    geometry = stride, dilation * (k // 2), dilation
    x, weight = torch.randn(4, C, 18, 18), torch.randn(C, 1, k, k)
    exact = output_and_gradients(lambda x, w: F.conv2d(x, w, None, *geometry, C), x.double(), weight.double())
    found = output_and_gradients(lambda x, w: channels_last(x, w, *geometry), x, weight)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4)  # sums of up to 1,296 products


def test_a_dense_gradient_is_the_same_gradient_in_the_layout_of_its_tensor():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    y = dense_gradient(x)
    g = torch.randn(2, 9, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)[:, 3:6]
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y, x, g)
    assert torch.equal(gradient, g)
    assert gradient.stride() == x.stride() != g.stride()
    assert torch.autograd.gradgradcheck(lambda x: dense_gradient(x.square()), x)


@pytest.mark.parametrize("first", [0, 1])
def test_every_second_pixel_and_its_gradient(first):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    picked = every_second(x, first)
    assert torch.equal(picked, x[..., first::2, first::2])
    (gradient,) = torch.autograd.grad(picked.sum(), x)
    (expected,) = torch.autograd.grad(x[..., first::2, first::2].sum(), x)
    assert torch.equal(gradient, expected)
    assert gradient.stride() == x.stride()
