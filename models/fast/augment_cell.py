"""The fused execution of the augment cell. On the CPU each half of a separable convolution is two calls of C code."""

import torch
from torch import nn

from models.fast import native
from models.fast.depthwise import convolve, dense_gradient
from models.fast.folded_bn import normalised_product
from models.fast.modules import is_changed, is_standard_link, links_of, signature
from models.ops import DilConv, SepConv


def fused_node(ops: nn.ModuleList, states: list[torch.Tensor]) -> torch.Tensor:
    """A node of an augment cell: the sum of its operations, each applied to the state of index `s_idx`."""
    return dense_gradient(sum(run(op, states[op.s_idx]) for op in ops))


def run(op: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute op(x); the modules of an `nn.Sequential` run one after the other.

    In training on channels-last CPU images SepConv and DilConv run in C: ReLU and depthwise convolution in one call,
    pointwise convolution and BN in another. The numbers are the same up to rounding.
    """
    if type(op) is nn.Sequential and not is_changed(op):
        for module in op:
            x = run(module, x)
        return x
    if not (type(op) in (SepConv, DilConv) and op.training and _runs_in_c(x) and _is_relu_chain(op, x.dtype)):
        return op(x)
    for link in links_of(op):
        conv = link.depthwise
        (z,) = convolve([x], [conv.weight], [(0, 0, 0, conv.stride[0], conv.dilation[0])])
        x = normalised_product(z, link.pointwise[0].weight, link.bn)
    return x


def _runs_in_c(x):
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return native.can_read(x) and is_channels_last and native.knows(x.dtype) and not torch.is_autocast_enabled("cpu")


def _is_relu_chain(op, dtype):
    """Whether all links of an operation are standard, with BN in training, and weights of this type."""
    if signature(op) is None or any(weight.dtype != dtype or not weight.is_cpu for weight in op.parameters()):
        return False
    links = links_of(op)
    return bool(links) and all(is_standard_link(link) and link.bn.training for link in links)
