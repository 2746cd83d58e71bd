import copy
import math

import pytest
import torch
from torch import nn

from models.choices import PRIMITIVES
from models.ops import OPS, DropPath_, FactorizedReduce, MixedOp, PoolBN, drop_path_


def test_primitives_are_the_papers_in_the_fixed_order():
    names = "max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5 none"
    assert " ".join(PRIMITIVES) == names


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [8, 7, 5, 2, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_every_op_keeps_channels_and_leaves_ceil_of_size_over_stride(name, stride, size, memory_format):
    op = OPS[name](4, stride, True).to(memory_format=memory_format)
    x = torch.randn(3, 4, size, size).to(memory_format=memory_format).requires_grad_()
    out = op(x)
    assert out.shape == (3, 4, math.ceil(size / stride), math.ceil(size / stride))
    if name != "none":
        out.square().sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", PRIMITIVES)
def test_search_ops_have_batch_norm_without_affine_part(name):
    assert all(bn.weight is None for bn in OPS[name](4, 2, False).modules() if isinstance(bn, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # C = 4; depthwise k*k*C, pointwise C*C; BN with affine 2C
        ("max_pool_3x3", 8),
        ("avg_pool_3x3", 8),
        ("skip_connect", 0),
        ("none", 0),
        ("sep_conv_3x3", 2 * (9 * 4 + 16 + 8)),
        ("sep_conv_5x5", 2 * (25 * 4 + 16 + 8)),
        ("sep_conv_7x7", 2 * (49 * 4 + 16 + 8)),
        ("dil_conv_3x3", 9 * 4 + 16 + 8),
        ("dil_conv_5x5", 25 * 4 + 16 + 8),
        ("conv_7x1_1x7", 2 * 7 * 16 + 8),
    ],
)
def test_parameters_of_an_op_are_those_of_its_definition(name, parameters):
    assert sum(p.numel() for p in OPS[name](4, 1, True).parameters()) == parameters


def test_average_pool_does_not_count_the_padding():
    pool = PoolBN("avg", 1, 3, 1, 1)[0]
    assert torch.equal(pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 10), (6, 9)])
def test_factorized_reduce_reads_even_and_odd_pixels_and_zeros_past_an_odd_border(size):
    reduce = FactorizedReduce(1, 2)
    with torch.no_grad():
        reduce.conv1.weight.fill_(1)
        reduce.conv2.weight.fill_(1)
    reduce.bn = nn.Identity()
    x = torch.arange(1.0, size[0] * size[1] + 1).view(1, 1, *size)
    even, odd = reduce(x)[0]
    assert torch.equal(even, x[0, 0, ::2, ::2])
    expected = torch.zeros_like(even)
    inner = x[0, 0, 1::2, 1::2]
    expected[: inner.size(0), : inner.size(1)] = inner
    assert torch.equal(odd, expected)


def test_factorized_reduce_makes_any_number_of_channels_from_two_up():
    for C_out in (2, 3, 5):
        assert FactorizedReduce(3, C_out)(torch.randn(2, 3, 9, 9)).shape == (2, C_out, 5, 5)
    with pytest.raises(ValueError, match="at least 2"):
        FactorizedReduce(3, 1)


def test_mixed_op_is_the_weighted_sum_of_its_candidates():
    torch.manual_seed(0)
    mixed, x = MixedOp(4, 1).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    weights = torch.rand(len(PRIMITIVES), dtype=torch.float64)
    expected = sum(w * op(x) for w, op in zip(weights, mixed._ops))
    assert len(mixed._ops) == len(PRIMITIVES)
    assert torch.allclose(mixed(x, weights), expected, rtol=1e-12)
    one_hot = torch.eye(len(PRIMITIVES), dtype=torch.float64)
    assert torch.equal(mixed(x, one_hot[PRIMITIVES.index("skip_connect")]), x)
    assert not mixed(x, one_hot[PRIMITIVES.index("none")]).any()


def test_none_is_zero_whatever_comes_in():
    assert torch.equal(OPS["none"](1, 2, True)(torch.full((1, 1, 3, 3), torch.nan)), torch.zeros(1, 1, 2, 2))


def test_drop_path_zeroes_whole_samples_and_divides_survivors_by_the_keep_probability():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 1, 1)
    out = drop_path_(x, 0.25, training=True)
    assert out is x  # in place
    assert torch.equal(x[:, 0], x[:, 1])
    assert set(x.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # the standard deviation of the dropped fraction is sqrt(0.25 * 0.75 / 20000) = 0.003; five of them
    assert abs((x[:, 0] == 0).float().mean().item() - 0.25) < 0.016


def test_drop_path_does_nothing_in_eval_or_at_zero():
    x = torch.randn(8, 2, 2, 2)
    module = DropPath_(0.5).eval()
    assert torch.equal(module(x.clone()), x)
    assert torch.equal(drop_path_(x.clone(), 0.0, training=True), x)


@pytest.mark.parametrize("p", [1.0, -0.1, 2.0])
def test_drop_path_refuses_probabilities_that_leave_nothing(p):
    with pytest.raises(ValueError, match="drop_prob"):
        drop_path_(torch.ones(1, 1, 1, 1), p, training=True)


@pytest.mark.parametrize("C", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factorized_reduce_has_right_weight_gradients_in_float32(C, memory_format):
    exact = FactorizedReduce(C, 2 * C, affine=False).double()
    op = copy.deepcopy(exact).float().to(memory_format=memory_format)
    x = torch.randn(16, C, 8, 8)
    g = torch.randn(16, 2 * C, 4, 4)
    expected = torch.autograd.grad(exact(x.double()), list(exact.parameters()), g.double())
    found = torch.autograd.grad(op(x.to(memory_format=memory_format)), list(op.parameters()), g)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
