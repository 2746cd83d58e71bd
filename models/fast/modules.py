"""Which modules the fused execution supports. All others run by their own `forward`.

A module is supported if its class is exactly one of those below, not a subclass, and if nobody has changed what it
does: it has no hooks, and no `forward` was set on the instance.
"""

from dataclasses import dataclass

from torch import nn

from models.ops import DilConv, FactorizedReduce, Identity, SepConv, Zero
from models.sync_bn import SyncBatchNorm2d

POOLS = (nn.MaxPool2d, nn.AvgPool2d)
BATCH_NORMS = (nn.BatchNorm2d, SyncBatchNorm2d)


@dataclass(frozen=True)
class Link:
    """A step of a chain: ReLU, depthwise convolution, pointwise convolution, BN.

    FactorizedReduce is a link too: it has no depthwise convolution (None) and two pointwise ones.
    """

    activation: nn.Module
    depthwise: nn.Conv2d | None
    pointwise: list[nn.Conv2d]
    bn: nn.BatchNorm2d


def links_of(op: nn.Module) -> list[Link]:
    """The links of a SepConv, DilConv or FactorizedReduce; [] for another operation, or if its parts were replaced."""
    children = list(op.children())
    if type(op) is SepConv and [type(half) for half in children] == [DilConv, DilConv]:
        first, second = map(links_of, children)
        return first + second if first and second else []
    if type(op) is DilConv and len(children) == 4:
        activation, depthwise, pointwise, bn = children
        return [Link(activation, depthwise, [pointwise], bn)]
    if type(op) is FactorizedReduce:
        return [Link(op.relu, None, [op.conv1, op.conv2], op.bn)]
    return []


def is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` that was set on the instance."""
    attributes = vars(module)
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def signature(module: nn.Module) -> tuple | None:
    """A hashable description of what a module computes, without its weights; None if it or a part of it is changed.

    Modules with equal signatures can run together. That of a class which is not known here is the class.
    """
    kind, attributes = type(module), vars(module)
    if is_changed(module):
        return None
    if attributes["_modules"]:
        parts = [signature(part) for part in attributes["_modules"].values()]
        return None if None in parts else (kind, *parts)
    if kind not in KNOWN:
        return (kind,)
    tensors = (*attributes["_parameters"].values(), *attributes["_buffers"].values())
    return (kind, *map(attributes.get, SETTINGS), *[tensor is None for tensor in tensors])


KNOWN = (nn.Conv2d, *BATCH_NORMS, *POOLS, nn.ReLU, Zero, Identity)
SETTINGS = (  # the attributes of these classes that decide what is computed
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("num_features", "eps", "momentum", "training", "track_running_stats"),
    *("ceil_mode", "count_include_pad", "divisor_override", "inplace"),
)


def is_standard_link(link: Link) -> bool:
    """Whether a link is as `models.ops` builds it."""
    convolutions = [] if link.depthwise is None else [link.depthwise]
    return (
        type(link.activation) is nn.ReLU
        and not link.activation.inplace
        and all(map(_is_standard_convolution, convolutions + link.pointwise))
        and all(conv.groups == conv.in_channels == conv.out_channels for conv in convolutions)
        and all(conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 for conv in link.pointwise)
        and is_standard_bn(link.bn)
    )


def _is_standard_convolution(conv):
    """Whether it is square, without bias, and leaves ceil(size / stride) pixels a side."""
    if type(conv) is not nn.Conv2d or conv.bias is not None or conv.padding_mode != "zeros":
        return False
    k, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    square = (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    return k % 2 == 1 and square == tuple((value, value) for value in (k, stride, dilation, dilation * (k // 2)))


def is_standard_bn(bn: nn.Module) -> bool:
    """Whether this is BN with running statistics, a momentum, and both of weight and bias or neither."""
    return (
        type(bn) in BATCH_NORMS
        and bn.momentum is not None
        and bn.running_mean is not None
        and (bn.weight is None) == (bn.bias is None)
    )


def is_synced(bn: nn.Module) -> bool:
    """Whether BN uses the statistics of the global batch."""
    return type(bn) is SyncBatchNorm2d
