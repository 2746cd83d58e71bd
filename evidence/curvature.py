"""The curvature of the validation loss in the space of architectures: the dominant eigenvalue of its Hessian in alpha.

Zela et al. (arXiv:1909.09656, section 4) found that it grows before a search collapses. As theirs, this is exact double
differentiation, at the current w, on one batch with BN by the batch's statistics. Differences of gradients would be
cheaper, since the fused execution could compute them, but ReLUs and max pools make them unreliable: docs/collapse.md.
"""

import copy
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from models.search_cnn import SearchCNN
from models.sync_bn import SyncBatchNorm2d

MAX_PIXELS = 8192  # in all images of the batch together: the graph of a default network takes about 2.5 GB for these
MAX_PRODUCTS = 8
TOLERANCE = 0.03


def images_within(n: int, size: int) -> int:
    """How many of n images of size x size pixels are used: as many as have `MAX_PIXELS` together, but 2 if n allows."""
    return min(n, max(2, MAX_PIXELS // size**2))


def dominant_eigenvalue(
    net: SearchCNN,
    X: torch.Tensor,
    y: torch.Tensor,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
) -> float | None:
    """The eigenvalue of largest magnitude of d2 L / d alpha2 at a batch, or None if it cannot be computed.

    By Lanczos's method with full orthogonalisation, from a seeded direction, until the residual's bound on the error is
    below `tolerance` times the eigenvalue, or after `max_products` products. The network does not change, and no random
    number is drawn from the global generators.
    """
    try:
        net = _twice_differentiable(net)
        alphas = list(net.alphas())
        with torch.autocast(X.device.type, enabled=False):
            gradient = _flat(torch.autograd.grad(net.loss(X, y), alphas, create_graph=True, materialize_grads=True))

            def product(v):
                return _flat(torch.autograd.grad(gradient, alphas, v, retain_graph=True, materialize_grads=True))

            start = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            return lanczos(product, start.to(gradient), tolerance, max_products)
    except (MemoryError, RuntimeError) as error:  # such as an operation of a user's that has no second derivative
        reason = " ".join(str(error).split())[:200]
        logging.getLogger("darts").info(f"the dominant eigenvalue could not be computed: {reason}")
        return None


def lanczos(product: Callable, start: torch.Tensor, tolerance: float, max_products: int) -> float:
    """The eigenvalue of largest magnitude of a symmetric matrix, given by its product with a vector."""
    basis, diagonal, off_diagonal = [start / start.norm()], [], []
    while True:
        v = product(basis[-1])
        diagonal.append((v @ basis[-1]).item())
        Q = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow
            v = v - Q.T @ (Q @ v)
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, value in enumerate(off_diagonal):
            T[i, i + 1] = T[i + 1, i] = value
        eigenvalues, vectors = torch.linalg.eigh(T)
        largest = eigenvalues.abs().argmax()
        residual = v.norm().item()
        error = residual * abs(vectors[-1, largest].item())
        is_whole = len(basis) == len(start) or residual == 0
        if is_whole or error <= tolerance * abs(eigenvalues[largest].item()) or len(basis) >= max_products:
            return eigenvalues[largest].item()
        basis.append(v / residual)
        off_diagonal.append(residual)


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def _twice_differentiable(net):
    """A copy of the network in training mode, without noise, whose loss can be differentiated twice in alpha.

    The cells run by their definition, since the fused execution can be differentiated only once, and so can BN over
    ranks. w is constant.
    """
    net = copy.deepcopy(net).train()
    net.noise, net.recompute = None, False
    for cell in net.cells:
        cell.execution = "plain"
    for w in net.weights():
        w.requires_grad_(False)
    for module in net.modules():
        if type(module) is SyncBatchNorm2d:
            module.__class__ = nn.BatchNorm2d
        elif type(module) is nn.Conv2d and module.bias is None and module.padding_mode == "zeros":
            module.__class__ = _Conv2d
    return net


class _Conv2d(nn.Conv2d):
    def forward(self, x):
        return _Convolution.apply(x, self)


class _Convolution(torch.autograd.Function):
    """A convolution with constant weights, which is linear: it and its transpose are each other's gradient.

    PyTorch's second derivative of a depthwise convolution takes each channel by itself, and twice as long in all.
    """

    @staticmethod
    def forward(ctx, x, conv):
        ctx.conv, ctx.shape = conv, x.shape
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx, g):
        return _Transpose.apply(g, ctx.conv, ctx.shape), None


class _Transpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, conv, shape):
        ctx.conv = conv
        return nn.grad.conv2d_input(shape, conv.weight, g, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx, x):
        return _Convolution.apply(x, ctx.conv), None, None
