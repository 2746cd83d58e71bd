"""Which modules the fused execution supports. All others run by their own `forward`.

A module is supported if its class is exactly one of those below, not a subclass, and if nobody has changed what it
does: it has no hooks, and no `forward` was set on the instance.
"""

from dataclasses import dataclass
from operator import itemgetter

from torch import nn

from models.ops import DilConv, FactorizedReduce, SepConv, Zero
from models.sync_bn import SyncBatchNorm2d

ACTIVATIONS = (nn.ReLU, nn.Softplus)  # Softplus replaces ReLU in networks that must be smooth
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
BATCH_NORMS = (nn.BatchNorm2d, SyncBatchNorm2d)


@dataclass(frozen=True)
class Link:
    """A step of a chain: activation, depthwise convolution, pointwise convolution, BN.

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

    Modules with equal signatures can run together.
    """
    kind, attributes = type(module), vars(module)
    if is_changed(module):
        return None
    if attributes["_modules"]:
        parts = [signature(part) for part in attributes["_modules"].values()]
        return None if None in parts else (kind, *parts)
    settings = _SETTINGS.get(kind)
    return (kind, settings and settings(attributes))


def _conv_settings(attributes):
    return (*_CONV_ATTRIBUTES(attributes), attributes["_parameters"]["bias"] is not None)


def _bn_settings(attributes):
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    missing = parameters["weight"] is None, parameters["bias"] is None, buffers["running_mean"] is None
    return (*_BN_ATTRIBUTES(attributes), *missing)


_CONV_ATTRIBUTES = itemgetter(
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)
_BN_ATTRIBUTES = itemgetter("num_features", "eps", "momentum", "training", "track_running_stats")
_SETTINGS = {  # class -> a function of a module's attributes that returns its settings
    nn.Conv2d: _conv_settings,
    nn.BatchNorm2d: _bn_settings,
    SyncBatchNorm2d: _bn_settings,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    Zero: itemgetter("stride"),
    nn.ReLU: itemgetter("inplace"),
    nn.Softplus: itemgetter("beta", "threshold"),
}


def is_standard_link(link: Link) -> bool:
    """Whether a link is as `models.ops` builds it, with any of `ACTIVATIONS`."""
    return (
        type(link.activation) in ACTIVATIONS
        and not vars(link.activation).get("inplace")
        and (link.depthwise is None or _is_standard_depthwise(link.depthwise))
        and all(map(_is_standard_pointwise, link.pointwise))
        and is_standard_bn(link.bn)
    )


def _is_standard_depthwise(conv):
    if type(conv) is not nn.Conv2d:
        return False
    C, k = conv.in_channels, conv.kernel_size[0]
    return k % 2 == 1 and signature(conv) == _conv_signature(C, C, k, conv.stride[0], conv.dilation[0], groups=C)


def _is_standard_pointwise(conv):
    return type(conv) is nn.Conv2d and signature(conv) == _conv_signature(conv.in_channels, conv.out_channels, k=1)


def _conv_signature(C_in, C_out, k, stride=1, dilation=1, groups=1):
    """The signature of a square convolution without bias that leaves ceil(size / stride) pixels a side."""
    square = [(value, value) for value in (k, stride, dilation * (k // 2), dilation)]
    return nn.Conv2d, (C_in, C_out, *square, groups, "zeros", False)


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


def geometry(conv: nn.Conv2d) -> tuple[int, int, int]:
    """(stride, padding, dilation) of a square convolution."""
    return conv.stride[0], conv.padding[0], conv.dilation[0]
