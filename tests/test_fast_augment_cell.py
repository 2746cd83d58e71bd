"""The fused execution of the augment cell gives the numbers of the modules, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from genotypes import DARTS_V2
from models.augment_cells import AugmentCell
from models.fast.augment_cell import run
from models.ops import DilConv, DropPath_, SepConv
from models.sync_bn import synchronise

CHAINS = {
    "sep_conv_3x3": lambda K, C, stride, affine: SepConv(K, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda K, C, stride, affine: SepConv(K, C, 5, stride, 2, affine),
    "dil_conv_3x3": lambda K, C, stride, affine: DilConv(K, C, 3, stride, 2, 2, affine),
    "dil_conv_5x5": lambda K, C, stride, affine: DilConv(K, C, 5, stride, 4, 2, affine),
}


def channels_last(*shape):
    return torch.randn(*shape, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()


def results(function, op, x):
    """The output of function(op, x), all gradients, and the buffers after it."""
    y = function(op, x)
    towards = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x, *op.parameters()], towards), *op.buffers()]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).double().norm() <= 1e-10 * other.double().norm() + 1e-12


def modules(op, x):
    """The operation's own forward, on images that no module takes for channels-last ones."""
    return op(x.contiguous())


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(list(CHAINS)),
    stride=st.sampled_from([1, 2]),
    affine=st.booleans(),
    synced=st.booleans(),
    training=st.booleans(),
    N=st.integers(2, 9),
    K=st.integers(1, 18),
    C=st.integers(1, 18),
    H=st.integers(2, 11),
    W=st.integers(2, 11),
    seed=st.integers(0, 2**31),
)
def test_a_chain_gives_what_its_modules_give(name, stride, affine, synced, training, N, K, C, H, W, seed):
    torch.manual_seed(seed)
    op = CHAINS[name](K, C, stride, affine).double().train(training)
    for parameter in op.parameters():
        nn.init.normal_(parameter)
    if synced:
        synchronise(op)
    x = channels_last(N, K, H, W)
    assert_same(results(run, copy.deepcopy(op), x), results(modules, op, x))


@pytest.mark.parametrize("place", ["relu", "depthwise", "pointwise", "bn", "whole"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_an_operation_are_called(place, kind):
    op, called = nn.Sequential(DilConv(3, 3, 3, 1, 1, 1).double(), DropPath_()), []
    module = op if place == "whole" else op[0][["relu", "depthwise", "pointwise", "bn"].index(place)]
    getattr(module, f"register_{kind}_hook")(lambda *arguments: called.append(place))
    y = run(op, channels_last(2, 3, 5, 5))
    y.sum().backward()
    assert called == [place]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(DilConv):
    def forward(self, x):
        return super().forward(x) / 2


def conv(*sizes, **options):
    return nn.Conv2d(4, 4, *sizes, **{"bias": False} | options).double()


CHANGES = {
    "bias": lambda op: op[0].register_module("2", conv(1, bias=True)),
    "own forward": lambda op: op[0].register_module("2", Doubled(4, 4, 1, bias=False).double()),
    "reflecting": lambda op: op[0].register_module("1", conv(3, padding=1, groups=4, padding_mode="reflect")),
    "same": lambda op: op[0].register_module("1", conv(3, padding="same", groups=4)),
    "activation": lambda op: op[0].register_module("0", nn.GELU()),
    "frozen": lambda op: op[0][3].eval(),
    "no momentum": lambda op: op[0].register_module("3", nn.BatchNorm2d(4, momentum=None).double()),
    "a half gone": lambda op: op.register_module("1", nn.Identity()),
    "a half of its own": lambda op: op.register_module("0", Halved(4, 4, 3, 1, 1, 1).double()),
    "patched": lambda op: setattr(op[0][2], "forward", lambda x: x * op[0][2].weight.mean()),
    "normed weights": lambda op: nn.utils.parametrizations.weight_norm(op[0][2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_been_changed_runs_by_itself(change):
    """After an unchanged one has run, since what is known of that must not be used for this."""
    op, x = SepConv(4, 4, 3, 1, 1).double(), channels_last(2, 4, 6, 6)
    run(op, x)
    CHANGES[change](op)
    state = copy.deepcopy(op.state_dict())
    found = results(run, op, x)
    found = [tensor.clone() for tensor in found]
    op.load_state_dict(state)
    assert_same(found, results(modules, op, x))


def test_other_types_run_as_they_are():
    """Mixed precision keeps its type; networks of mixed types, which PyTorch allows, run."""
    op, x = DilConv(4, 4, 3, 1, 1, 1), channels_last(2, 4, 6, 6).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(op, x).dtype == op(x).dtype
    op[1].bfloat16()
    op[2].bfloat16()
    assert torch.equal(run(copy.deepcopy(op), x.bfloat16()), op(x.bfloat16()))


@pytest.mark.parametrize(("reduction_p", "reduction"), [(False, False), (True, False), (False, True)])
def test_a_cell_gives_what_its_modules_give(reduction_p, reduction):
    fused = AugmentCell(DARTS_V2, 6, 8, 4, reduction_p, reduction).double()
    plain = copy.deepcopy(fused)
    plain.execution = "plain"
    s0, s1 = channels_last(3, 6, *[13 if reduction_p else 7] * 2), channels_last(3, 8, 7, 7)
    assert_same(*(results(lambda cell, s0: cell(s0, s1), cell, s0) for cell in (fused, plain)))


def test_drop_path_may_change_its_output_in_place():
    torch.manual_seed(0)
    op, x = nn.Sequential(SepConv(3, 3, 3, 1, 1).double(), DropPath_(0.5)), channels_last(6, 3, 4, 4)
    torch.manual_seed(1)
    found = results(run, copy.deepcopy(op), x)
    torch.manual_seed(1)
    assert_same(found, results(modules, op, x))
    assert any(not image.any() for image in found[0])
