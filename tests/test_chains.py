"""Chains of the augment network run in fewer steps: the same numbers as their modules, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import chains
from models.ops import DilConv, DropPath_, PoolBN, SepConv
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
    """What function(op, x) gives, all gradients, and the buffers after it."""
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
    name=st.sampled_from(list(CHAINS)), stride=st.sampled_from([1, 2]), affine=st.booleans(), synced=st.booleans(),
    training=st.booleans(), N=st.integers(2, 9), K=st.integers(1, 18), C=st.integers(1, 18), H=st.integers(2, 11),
    W=st.integers(2, 11), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_chain_gives_what_its_modules_give(name, stride, affine, synced, training, N, K, C, H, W, seed):
    torch.manual_seed(seed)
    op = CHAINS[name](K, C, stride, affine).double().train(training)
    for parameter in op.parameters():
        nn.init.normal_(parameter)
    if synced:
        synchronise(op)
    x = channels_last(N, K, H, W)
    assert_same(results(chains.run, copy.deepcopy(op), x), results(modules, op, x))


def test_it_can_be_differentiated_twice():
    op, x = SepConv(3, 4, 3, 2, 1).double(), channels_last(4, 3, 5, 6)

    def second(function):
        g, *gs = torch.autograd.grad(function(op, x).pow(3).sum(), [x, *op.parameters()], create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in (g, *gs)), [x, *op.parameters()])

    assert_same(second(chains.run), second(modules))


def test_it_takes_two_steps_for_each_link_instead_of_four():
    x = channels_last(4, 8, 6, 6)

    def steps(y):
        """The names of what y's gradient goes through on its way to x."""
        function, names = y.grad_fn, []
        while function is not None and "Accumulate" not in type(function).__name__:
            names.append(type(function).__name__)
            before = [f for f, _ in function.next_functions if f is not None]
            function = next((f for f in before if "Accumulate" not in type(f).__name__), None)
        return names

    assert steps(chains.run(SepConv(8, 8, 3, 1, 1).double(), x)) == ["MixtureBackward", "_ChannelsLastBackward"] * 2


@pytest.mark.parametrize("place", ["relu", "depthwise", "pointwise", "bn", "whole"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_inside_an_operation_are_called(place, kind):
    op, called = nn.Sequential(DilConv(3, 3, 3, 1, 1, 1).double(), DropPath_()), []
    module = op if place == "whole" else op[0][["relu", "depthwise", "pointwise", "bn"].index(place)]
    getattr(module, f"register_{kind}_hook")(lambda *arguments: called.append(place))
    y = chains.run(op, channels_last(2, 3, 5, 5))
    y.sum().backward()
    assert called == [place]


@pytest.mark.parametrize("change", ["bias", "padding_mode", "activation", "norm", "frozen"])
def test_what_is_no_longer_such_a_chain_runs_by_itself(change):
    op, x = DilConv(4, 4, 3, 1, 1, 1).double(), channels_last(2, 4, 5, 5)
    if change == "bias":
        op[2] = nn.Conv2d(4, 4, 1, bias=True).double()
    elif change == "padding_mode":
        op[1] = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, padding_mode="reflect").double()
    elif change == "activation":
        op[0] = nn.GELU()
    elif change == "norm":
        op[3] = nn.GroupNorm(2, 4).double()
    else:
        op[3].eval()
    assert_same(results(chains.run, copy.deepcopy(op), x), results(modules, op, x))


def test_drop_path_may_change_its_output_in_place():
    torch.manual_seed(0)
    op, x = nn.Sequential(SepConv(3, 3, 3, 1, 1).double(), DropPath_(0.5)), channels_last(6, 3, 4, 4)
    torch.manual_seed(1)
    found = results(chains.run, copy.deepcopy(op), x)
    torch.manual_seed(1)
    assert_same(found, results(modules, op, x))
    assert any(not image.any() for image in found[0])


def test_other_operations_run_as_they_are():
    op, x = PoolBN("max", 3, 3, 1, 1).double(), channels_last(2, 3, 5, 5)
    assert_same(results(chains.run, copy.deepcopy(op), x), results(modules, op, x))


def test_one_value_a_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than one value per channel"):
        chains.run(DilConv(3, 3, 3, 2, 1, 1).double(), channels_last(1, 3, 2, 2))
