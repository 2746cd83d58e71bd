"""The candidate operations of the search space (DARTS, section 3.1), and their mixture on an edge.

To add an operation, add an entry to `OPS`, and a class if none of those here computes it. Tests run on every entry.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from models.choices import PRIMITIVES

# name -> f(C, stride, affine), which returns a module with C input and C output channels; its output has
# ceil(size / stride) pixels a side.
OPS: dict[str, Callable[..., nn.Module]] = {
    "max_pool_3x3": lambda C, stride, affine: PoolBN("max", C, 3, stride, 1, affine),
    "avg_pool_3x3": lambda C, stride, affine: PoolBN("avg", C, 3, stride, 1, affine),
    "skip_connect": lambda C, stride, affine: Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine),  # sees 5x5 pixels
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine),  # sees 9x9 pixels
    "conv_7x1_1x7": lambda C, stride, affine: FacConv(C, C, 7, stride, 3, affine),
    "nor_conv_1x1": lambda C, stride, affine: StdConv(C, C, 1, stride, 0, affine),
    "nor_conv_3x3": lambda C, stride, affine: StdConv(C, C, 3, stride, 1, affine),
    "avg_pool_3x3_only": lambda C, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),  # no BN
    "none": lambda C, stride, affine: Zero(stride),
}


def drop_path_(
    x: torch.Tensor, drop_prob: float, training: bool, batch: tuple[int, slice] | None = None
) -> torch.Tensor:
    """Zero whole samples of `x` with probability `drop_prob`, in place; divide the others by the keep probability.

    x: (N, ...), on any device. batch: (n, rows) if x is the slice `rows` of a global batch of n samples that several
    processes share, else None. Each process then draws for all n samples, so that together they drop the samples that
    one process would drop. Outside training, or with drop_prob 0, x is returned unchanged. Raises ValueError unless
    0 <= drop_prob < 1.
    Source: Larsson et al., FractalNet, as used in DARTS, appendix A.2.1.
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
    """`drop_path_` as a module, in place. `AugmentCNN` sets `p` (its drop_prob) and `batch` (see `drop_path_`)."""

    def __init__(self, p: float = 0.0):
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

    def forward(self, x):
        # On CUDA PyTorch computes wrong gradients for average pooling of channels-last images (seen with torch 2.11).
        return super().forward(x.contiguous() if x.is_cuda else x)


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
    """Two depthwise separable convolutions, of which the first has the stride."""

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

    Each convolution computes half of the output channels. Like every stride-2 operation, it turns size into
    ceil(size / 2): for an odd size the shifted image is padded with zeros. Raises ValueError if C_out < 2.
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
        # Select every second pixel, then convolve with stride 1: on the CPU PyTorch computes wrong weight gradients for
        # a channels-last 1x1 convolution of stride 2 from fewer than 8 channels (seen with torch 2.14).
        even = x[:, :, ::2, ::2]
        odd = F.pad(x[:, :, 1::2, 1::2], (0, width % 2, 0, height % 2))
        return self.bn(torch.cat([self.conv1(even), self.conv2(odd)], dim=1))


class MixedOp(nn.Module):
    """An edge of the search cell: the weighted sum of all candidate operations (DARTS, eq. 2).

    BN has no affine parameters here, since they could rescale the operations and so undo alpha (appendix A.1.1).
    C: channels; stride: 1, or 2 on the edges from the inputs of a reduction cell; primitives: the candidates' names.
    """

    def __init__(self, C: int, stride: int, primitives: Iterable[str] = PRIMITIVES):
        super().__init__()
        self._ops = nn.ModuleList(OPS[primitive](C, stride, affine=False) for primitive in primitives)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: (N, C, H, W); weights: (len(primitives),), this edge's row of `SearchCNN.edge_weights`."""
        return sum(weight * op(x) for weight, op in zip(weights, self._ops, strict=True))


class PartialMixedOp(MixedOp):
    """A mixture on the first C / K of the channels; the others bypass the candidates (PC-DARTS, eq. 2):

        y = shuffle(concat(sum over candidates o of w_o o(select(x)), (sum over o of w_o) bypass(x)))

    `bypass` halves the image at stride 2. The sum of the weights is 1 if they are a softmax, and the edge's weight if
    edges are normalised. The channels are shuffled so that other channels have candidates on the next edge. C must be
    divisible by K.
    """

    def __init__(self, C: int, stride: int, primitives: Iterable[str] = PRIMITIVES, K: int = 4):
        super().__init__(C // K, stride, primitives)
        self.K, self.stride = K, stride

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.K == 1:
            return super().forward(x, weights)
        return self.merge(super().forward(self.select(x), weights), weights.sum() * self.bypass(x))

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """The channels that have candidates."""
        return x[:, : x.shape[1] // self.K]

    def bypass(self, x: torch.Tensor) -> torch.Tensor:
        """The other channels, of ceil(size / stride) pixels a side."""
        rest = x[:, x.shape[1] // self.K :]
        return F.max_pool2d(rest, 2, ceil_mode=True) if self.stride == 2 else rest

    def merge(self, mixed: torch.Tensor, bypassed: torch.Tensor) -> torch.Tensor:
        """All channels, shuffled in K groups. This is linear, so the edges of a node can be summed before it."""
        x = torch.cat([mixed, bypassed], dim=1)
        return x.unflatten(1, (self.K, -1)).transpose(1, 2).flatten(1, 2)
