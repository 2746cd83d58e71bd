"""The operations that are chains of (activation, depthwise convolution, pointwise convolution, BN), as such.

`links_of` says what an operation chains, `signature` which modules may run as one, and `run` runs the chains of the
augment network in fewer steps than their modules would.
"""

from collections import namedtuple
from operator import itemgetter

from torch import nn

from models.depthwise import DepthwiseConv2d, channels_last_depthwise, is_channels_last_on_cpu
from models.folded_bn import normalised_product
from models.ops import DilConv, SepConv, Zero
from models.sync_bn import SyncBatchNorm2d

ELEMENTWISE = (nn.ReLU, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh)  # activations that work in any layout

# a step of a chain: activation, depthwise convolution (None: FactorizedReduce's two views), pointwise ones, BN
Link = namedtuple("Link", "activation spatial pointwise bn")


def links_of(op):
    """The steps that a SepConv, DilConv or FactorizedReduce chains."""
    if isinstance(op, SepConv):
        return [link for half in op for link in links_of(half)]
    if isinstance(op, DilConv):
        activation, spatial, pointwise, bn = op
        return [Link(activation, spatial, [pointwise], bn)]
    return [Link(op.relu, None, [op.conv1, op.conv2], op.bn)]


def run(op, x):
    """op(x), a `nn.Sequential`'s modules one after the other.

    In training on channels-last CPU images, a chain's ReLU and depthwise convolution are one step and its pointwise
    convolution and BN another; the numbers are the same.
    """
    if type(op) is nn.Sequential and not _has_hooks(vars(op)):
        for part in op:
            x = run(part, x)
        return x
    if (
        type(op) not in (SepConv, DilConv)
        or not op.training
        or not is_channels_last_on_cpu(x)
        or not _is_relu_chain(op)
    ):
        return op(x)
    for _, spatial, (pointwise,), bn in links_of(op):
        z = channels_last_depthwise(x, spatial.weight, *geometry(spatial), relu=True)
        x = normalised_product(z, pointwise.weight, bn)
    return x


def geometry(conv):
    """(stride, padding, dilation) of a square one."""
    return conv.stride[0], conv.padding[0], conv.dilation[0]


_RELU_CHAINS = {}


def _is_relu_chain(op):
    known = signature(op)
    if known not in _RELU_CHAINS:
        _RELU_CHAINS[known] = known is not None and all(
            is_plain(link) and type(link.activation) is nn.ReLU and link.bn.training for link in links_of(op)
        )
    return _RELU_CHAINS[known]


_CONV = itemgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_BN = itemgetter("eps", "momentum", "training", "track_running_stats")
_SETTINGS = {
    nn.Conv2d: _CONV, DepthwiseConv2d: _CONV, nn.BatchNorm2d: _BN, SyncBatchNorm2d: _BN,
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.AvgPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    Zero: itemgetter("stride"), nn.Softplus: itemgetter("beta", "threshold"),
    nn.ELU: itemgetter("alpha"), nn.GELU: itemgetter("approximate"),
}  # fmt: skip


def signature(module):
    """What a module computes but for its weights: equal for two modules that may run as one. None if it has a hook
    inside, which only its own forward calls."""
    kind, own = type(module), vars(module)
    if _has_hooks(own):
        return None
    if own["_modules"]:
        parts = [signature(part) for part in own["_modules"].values()]
        return None if None in parts else (kind, *parts)
    settings = _SETTINGS.get(kind)
    return (kind, settings and settings(own))


def _has_hooks(own):
    return own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]


def is_plain(link):
    """Whether a link is as `models.ops` makes it, but for the activation."""
    convs = [*link.pointwise, *([] if link.spatial is None else [link.spatial])]
    return (
        type(link.activation) in ELEMENTWISE
        and all(isinstance(conv, nn.Conv2d) and conv.bias is None and conv.padding_mode == "zeros" for conv in convs)
        and (link.spatial is None or link.spatial.groups == link.spatial.in_channels == link.spatial.out_channels)
        and is_plain_bn(link.bn)
    )


def is_plain_bn(bn):
    """Whether BN is PyTorch's, or that over all ranks, and moves running statistics by a momentum."""
    return type(bn) in (nn.BatchNorm2d, SyncBatchNorm2d) and bn.momentum is not None and bn.running_mean is not None
