"""Recognises the modules that the fused execution supports. All others run by their own `forward`.

A chain is an operation as a list of `Link`s: (activation, depthwise convolution, pointwise convolutions, BN). Modules
with equal `signature`s may run together. The signature is None for a module that must run by its own `forward`.
"""

from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn

from models.ops import DilConv, FactorizedReduce, Identity, MixedOp, PartialMixedOp, PoolBN, SepConv, Zero
from models.sync_bn import SyncBatchNorm2d

ACTIVATIONS = (nn.ReLU, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh)  # elementwise, so they work in any layout
POOLS = (nn.MaxPool2d, nn.AvgPool2d)
BATCH_NORMS = (nn.BatchNorm2d, SyncBatchNorm2d)

# `forward` of the classes that the fused execution replaces, as it was at import: a class that is patched later is not
# replaced. A class must be added here if it is to be replaced.
FORWARDS = {
    kind: kind.forward
    for kind in (
        *(
            MixedOp,
            PartialMixedOp,
            Identity,
            Zero,
            PoolBN,
            SepConv,
            DilConv,
            FactorizedReduce,
            nn.Sequential,
            nn.Conv2d,
        ),
        *(*BATCH_NORMS, *ACTIVATIONS, *POOLS),
    )
}
CALL, CALL_IMPL, CONV_FORWARD = nn.Module.__call__, nn.Module._call_impl, nn.Conv2d._conv_forward


@dataclass(frozen=True)
class Link:
    """A step of a chain. depthwise: a convolution, or None in FactorizedReduce, which has two pointwise ones."""

    activation: nn.Module
    depthwise: nn.Module | None
    pointwise: list
    bn: nn.Module


def links_of(op):
    """The links of a SepConv, DilConv or FactorizedReduce; [] for other operations, or if their parts were replaced."""
    kind, parts = type(op), list(op.children())
    if kind is SepConv and [type(half) for half in parts] == [DilConv, DilConv]:
        halves = [links_of(half) for half in parts]
        return halves[0] + halves[1] if all(halves) else []
    if kind is DilConv and len(parts) == 4:
        activation, depthwise, pointwise, bn = parts
        return [Link(activation, depthwise, [pointwise], bn)]
    return [Link(op.relu, None, [op.conv1, op.conv2], op.bn)] if kind is FactorizedReduce else []


def is_overridden(module):
    """Whether a module has hooks, a `forward` set on the instance, or a class whose `forward` was patched."""
    attributes, kind = vars(module), type(module)
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or kind.forward is not FORWARDS.get(kind, kind.forward)
    )


def has_global_hooks():
    """Whether every call of any module must run hooks, as profilers install them, or calls themselves were patched."""
    hooks = torch.nn.modules.module
    return (
        any(getattr(hooks, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))
        or any(kind.__call__ is not CALL for kind in FORWARDS)
        or nn.Module._call_impl is not CALL_IMPL
        or nn.Conv2d._conv_forward is not CONV_FORWARD
    )


def signature(module):
    """A hashable description of what a module computes, without its weights: see the top of this file."""
    kind, attributes = type(module), vars(module)
    if is_overridden(module):
        return None
    if attributes["_modules"]:
        parts = [signature(part) for part in attributes["_modules"].values()]
        return None if None in parts else (kind, *parts)
    settings = _SETTINGS.get(kind)
    return (kind, settings and settings(attributes))


def _conv_settings(attributes):
    return (*_OF_CONV(attributes), attributes["_parameters"]["bias"] is None)


def _bn_settings(attributes):
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    missing = (parameters["weight"] is None, parameters["bias"] is None, buffers["running_mean"] is None)
    return (*_OF_BN(attributes), *missing)


_OF_CONV = itemgetter(
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)
_OF_BN = itemgetter("num_features", "eps", "momentum", "training", "track_running_stats")
_SETTINGS = {  # class -> f(attributes) that returns the settings in the signature; `is_standard_link` checks no others
    nn.Conv2d: _conv_settings,
    nn.BatchNorm2d: _bn_settings,
    SyncBatchNorm2d: _bn_settings,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    Zero: itemgetter("stride"),
    nn.ReLU: itemgetter("inplace"),
    nn.SiLU: itemgetter("inplace"),
    nn.Softplus: itemgetter("beta", "threshold"),
    nn.ELU: itemgetter("alpha", "inplace"),
    nn.GELU: itemgetter("approximate"),
}


def is_standard_link(link):
    """Whether a link has the form that `models.ops` gives it, with any of `ACTIVATIONS`."""
    return (
        type(link.activation) in ACTIVATIONS
        and not vars(link.activation).get("inplace")
        and (link.depthwise is None or _is_standard_depthwise(link.depthwise))
        and all(map(_is_standard_pointwise, link.pointwise))
        and is_standard_bn(link.bn)
    )


def _is_standard_depthwise(conv):
    return (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels
        and all(
            type(size) is tuple and size[0] == size[1]
            for size in (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        )
        and conv.kernel_size[0] % 2 == 1
        and conv.padding[0] == conv.dilation[0] * (conv.kernel_size[0] // 2)
    )


def _is_standard_pointwise(conv):
    shape = conv.kernel_size, conv.stride, conv.padding
    return type(conv) is nn.Conv2d and conv.bias is None and conv.groups == 1 and shape == ((1, 1), (1, 1), (0, 0))


def is_standard_bn(bn):
    """Whether this is `nn.BatchNorm2d` or `SyncBatchNorm2d` with running statistics, a momentum, and both of weight and
    bias or neither."""
    return (
        type(bn) in BATCH_NORMS
        and bn.momentum is not None
        and bn.running_mean is not None
        and (bn.weight is None) == (bn.bias is None)
    )


def is_synced(bn):
    """Whether BN uses the statistics of the global batch."""
    return type(bn) is SyncBatchNorm2d


def separate_output(op, x):
    """op(x); raises ValueError unless it has the shape that an operation must give, which no sum may stretch it to."""
    y = op(x)
    half = [-(-side // 2) for side in x.shape[2:]]
    if y.shape[:2] != x.shape[:2] or list(y.shape[2:]) not in (list(x.shape[2:]), half):
        raise ValueError(
            f"an operation must keep images and channels, and leave ceil(size / stride) pixels a side: of "
            f"{tuple(x.shape)} it made {tuple(y.shape)}: {op}"
        )
    return y


def geometry(conv):
    """(stride, padding, dilation) of a square convolution."""
    return conv.stride[0], conv.padding[0], conv.dilation[0]
