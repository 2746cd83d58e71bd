"""The candidate operations of the search space (DARTS, section 3.1), and their mixture on an edge.

A new operation is one class and one entry in `OPS`; the tests walk the registry.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.choices import PRIMITIVES

# name -> f(C, stride, affine): an operation that keeps C channels and leaves ceil(size / stride) pixels a side
OPS = {
    "max_pool_3x3": lambda C, stride, affine: PoolBN("max", C, 3, stride, 1, affine),
    "avg_pool_3x3": lambda C, stride, affine: PoolBN("avg", C, 3, stride, 1, affine),
    "skip_connect": lambda C, stride, affine: Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine),  # sees 5x5 pixels
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine),  # sees 9x9 pixels
    "conv_7x1_1x7": lambda C, stride, affine: FacConv(C, C, 7, stride, 3, affine),
    "none": lambda C, stride, affine: Zero(stride),
}


def drop_path_(x, drop_prob, training, batch=None):
    """Zero whole samples of `x` with probability `drop_prob`, in place; divide the others by the keep probability.

    Shapes: x is (N, ...), on any device. batch: None, or (n, rows) where x is the slice `rows` of a batch of n that
    several processes share: each draws for all n, so that together they drop what one process would.
    Outside training, or with drop_prob 0, x is returned as it is. Raises ValueError unless 0 <= drop_prob < 1.
    Source: Larsson et al., FractalNet, as used in DARTS, section 4.1.
    """
    if not 0.0 <= drop_prob < 1.0:
        raise ValueError(f"drop_prob must be at least 0 and below 1, not {drop_prob}")
    if training and drop_prob > 0.0:
        keep_prob = 1.0 - drop_prob
        n, rows = batch or (x.size(0), slice(None))
        factor = x.new_empty((n,) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob).div_(keep_prob)
        x.mul_(factor[rows])
    return x


class DropPath_(nn.Module):
    """`drop_path_` as a module: in place, with a probability `p` and a shared `batch`, both set from outside."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p
        self.batch = None

    def forward(self, x):
        return drop_path_(x, self.p, self.training, self.batch)

    def extra_repr(self):
        return f"p={self.p}, inplace"


class PoolBN(nn.Sequential):
    """Pooling, then BN. `pool_type` is 'max' or 'avg'; the average does not count the padding."""

    def __init__(self, pool_type, C, kernel_size, stride, padding, affine=True):
        if pool_type == "max":
            pool = nn.MaxPool2d(kernel_size, stride, padding)
        elif pool_type == "avg":
            pool = nn.AvgPool2d(kernel_size, stride, padding, count_include_pad=False)
        else:
            raise ValueError(f"pool_type must be 'max' or 'avg', not {pool_type!r}")
        super().__init__(pool, nn.BatchNorm2d(C, affine=affine))


class StdConv(nn.Sequential):
    """ReLU - conv - BN."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class FacConv(nn.Sequential):
    """ReLU - conv (k x 1) - conv (1 x k) - BN: a k x k convolution factorized into two."""

    def __init__(self, C_in, C_out, kernel_length, stride, padding, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, (kernel_length, 1), (stride, 1), (padding, 0), bias=False),
            nn.Conv2d(C_in, C_out, (1, kernel_length), (1, stride), (0, padding), bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class DilConv(nn.Sequential):
    """ReLU - dilated depthwise conv - pointwise conv - BN."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class SepConv(nn.Sequential):
    """Depthwise separable convolution, twice; the stride is in the first."""

    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__(
            DilConv(C_in, C_in, kernel_size, stride, padding, 1, affine),
            DilConv(C_in, C_out, kernel_size, 1, padding, 1, affine),
        )


class Identity(nn.Identity):
    """The skip connection at stride 1."""


class Zero(nn.Module):
    """No connection: zeros, of ceil(size / stride) pixels a side."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def extra_repr(self):
        return f"stride={self.stride}"


class FactorizedReduce(nn.Module):
    """Halve the size with two 1x1 convolutions, of even pixels and of odd ones: ReLU - convs - concat - BN.

    An odd size leaves ceil(size / 2), as every stride-2 operation does: the odd pixels get a row and a column of zeros.
    Raises ValueError for fewer than two output channels, of which each convolution makes half.
    """

    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        if C_out < 2:
            raise ValueError(f"FactorizedReduce needs at least 2 output channels, not {C_out}")
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_out - C_out // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(C_in, C_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.relu(x)
        height, width = x.shape[2:]
        # Pixels first, then convolutions of stride 1. On the CPU the weight gradient of a channels-last 1x1 convolution
        # of stride 2 from fewer than 8 channels is wrong (seen with torch 2.14).
        even = x[:, :, ::2, ::2]
        odd = F.pad(x[:, :, 1::2, 1::2], (0, width % 2, 0, height % 2))
        return self.bn(torch.cat([self.conv1(even), self.conv2(odd)], dim=1))


class MixedOp(nn.Module):
    """All candidates of an edge at once, weighted (DARTS, eq. 2). BN has no affine part: weights could undo alpha.

    C: channels; stride: 1, or 2 on the edges from the inputs of a reduction cell; primitives: the candidates' names.
    """

    def __init__(self, C, stride, primitives=PRIMITIVES):
        super().__init__()
        self._ops = nn.ModuleList(OPS[primitive](C, stride, affine=False) for primitive in primitives)

    def forward(self, x, weights):
        """x: (N, C, H, W); weights: (len(primitives),), the edge's part of `SearchCNN.edge_weights`."""
        return sum(weight * op(x) for weight, op in zip(weights, self._ops, strict=True))
