"""The operations that are chains of (activation, depthwise convolution, pointwise convolution, BN), as such.

`links_of` says what an operation chains, `signature` which modules may run as one, and `run` runs the chains of the
augment network in fewer steps than their modules would.
"""

from collections import namedtuple
from operator import itemgetter

import torch
from torch import nn

from models.fast import native
from models.fast.depthwise import DepthwiseConv2d, channels_last_depthwise, is_channels_last_on_cpu
from models.fast.folded_bn import normalised_product
from models.ops import DilConv, FactorizedReduce, SepConv, Zero
from models.sync_bn import SyncBatchNorm2d

ELEMENTWISE = (nn.ReLU, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh)  # activations that work in any layout

# a step of a chain: activation, depthwise convolution (None: FactorizedReduce's two views), pointwise ones, BN
Link = namedtuple("Link", "activation spatial pointwise bn")


def links_of(op):
    """The steps that a SepConv, DilConv or FactorizedReduce chains; none of one that has been made into another."""
    kind, parts = type(op), list(op.children())
    if kind is SepConv and [type(half) for half in parts] == [DilConv, DilConv]:
        halves = [links_of(half) for half in parts]
        return halves[0] + halves[1] if all(halves) else []
    if kind is DilConv and len(parts) == 4:
        activation, spatial, pointwise, bn = parts
        return [Link(activation, spatial, [pointwise], bn)]
    return [Link(op.relu, None, [op.conv1, op.conv2], op.bn)] if kind is FactorizedReduce else []


def run(op, x):
    """op(x), a `nn.Sequential`'s modules one after the other.

    In training on channels-last CPU images, a chain's ReLU and depthwise convolution are one step in C and its
    pointwise convolution and BN another; the numbers are the same.
    """
    if type(op) is nn.Sequential and not _is_special(vars(op)):
        for part in op:
            x = run(part, x)
        return x
    if type(op) not in (SepConv, DilConv) or not op.training or not _is_for_c(x) or not _is_relu_chain(op, x.dtype):
        return op(x)
    for _, spatial, (pointwise,), bn in links_of(op):
        z = channels_last_depthwise(x, spatial.weight, *geometry(spatial), relu=True)
        x = normalised_product(z, pointwise.weight, bn)
    return x


def geometry(conv):
    """(stride, padding, dilation) of a square one."""
    return conv.stride[0], conv.padding[0], conv.dilation[0]


def _is_for_c(x):
    return is_channels_last_on_cpu(x) and native.knows(x.dtype) and not torch.is_autocast_enabled("cpu")


def _is_relu_chain(op, dtype):
    if any(parameter.dtype != dtype or not parameter.is_cpu for parameter in op.parameters()):
        return False
    known = signature(op)
    if known not in _RELU_CHAINS:
        links = links_of(op)
        _RELU_CHAINS[known] = bool(known and links) and all(
            is_plain(link) and type(link.activation) is nn.ReLU and link.bn.training for link in links
        )
    return _RELU_CHAINS[known]


_RELU_CHAINS = {}  # signature -> whether it is one


def _conv(own):
    return (*_OF_CONV(own), own["_parameters"]["bias"] is None)


def _bn(own):
    return (*_OF_BN(own), own["_parameters"]["weight"] is None, own["_buffers"]["running_mean"] is None)


_OF_CONV = itemgetter(
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
)
_OF_BN = itemgetter("num_features", "eps", "momentum", "training", "track_running_stats")
_SETTINGS = {  # what a signature has of a module, and all that `is_plain` asks
    nn.Conv2d: _conv, DepthwiseConv2d: _conv, nn.BatchNorm2d: _bn, SyncBatchNorm2d: _bn,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    Zero: itemgetter("stride"), nn.Softplus: itemgetter("beta", "threshold"),
    nn.ELU: itemgetter("alpha"), nn.GELU: itemgetter("approximate"),
}  # fmt: skip


def signature(module):
    """What a module computes but for its weights: equal for two modules that may run as one. None if there is a hook or
    another forward inside, which only a call of the module itself does."""
    kind, own = type(module), vars(module)
    if _is_special(own):
        return None
    if own["_modules"]:
        parts = [signature(part) for part in own["_modules"].values()]
        return None if None in parts else (kind, *parts)
    settings = _SETTINGS.get(kind)
    return (kind, settings and settings(own))


def _is_special(own):
    return (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    )  # fmt: skip


def is_plain(link):
    """Whether a link is as `models.ops` makes it, but for the activation."""
    stride = (1, 1) if link.spatial else (2, 2)
    return (
        type(link.activation) in ELEMENTWISE
        and (link.spatial is None or _is_plain_depthwise(link.spatial))
        and all(
            type(conv) is nn.Conv2d and conv.bias is None and conv.groups == 1
            and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), stride, (0, 0))
            for conv in link.pointwise
        )
        and is_plain_bn(link.bn)
    )  # fmt: skip


def _is_plain_depthwise(conv):
    return (
        type(conv) in (nn.Conv2d, DepthwiseConv2d)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels
        and all(type(size) is tuple and size[0] == size[1]
                for size in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    )  # fmt: skip


def is_plain_bn(bn):
    """Whether BN is PyTorch's, or that over all ranks, and moves running statistics by a momentum."""
    return type(bn) in (nn.BatchNorm2d, SyncBatchNorm2d) and bn.momentum is not None and bn.running_mean is not None
