"""What a user's script overrides in a network runs, in whatever way, under both executions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, both_executions
from epochs import two_steps
from test_examples import network
from torch import nn

from models.choices import EXECUTIONS, PRIMITIVES
from models.ops import OPS, FactorizedReduce, MixedOp
from models.search_cnn import SearchCNN


def double(edge, x, weights):
    return 2 * MixedOp.forward(edge, x, weights)


class Doubled(MixedOp):
    def forward(self, x, weights):
        return double(self, x, weights)


def subclassed(edge):
    edge.__class__ = Doubled


def hooked(edge):
    edge.register_forward_hook(lambda module, inputs, output: 2 * output)


def patched(edge):
    edge.forward = lambda x, weights: double(edge, x, weights)


@pytest.mark.long
@pytest.mark.parametrize("change", [subclassed, hooked, patched])
@pytest.mark.parametrize("places", [[(1, 2)], [(0, 1), (1, 0)], "all"])
def test_an_edge_that_is_overridden_runs_under_both_executions(change, places, layout):
    outputs = {}
    for execution in EXECUTIONS:
        net = network(SearchCNN, execution)
        unchanged = net(batch()[0])
        for cell in net.cells:
            for i, node in enumerate(cell.dag):
                for j, edge in enumerate(node):
                    if places == "all" or (i, j) in places:
                        change(edge)
        outputs[execution] = net(batch()[0])
        assert not torch.allclose(outputs[execution], unchanged, rtol=1e-3)
    torch.testing.assert_close(outputs["fused"], outputs["plain"], rtol=1e-9, atol=1e-11)


def give_bn_a_bias_alone_and_average_over_all_batches(net):
    for bn in (module for module in net.modules() if type(module) is nn.BatchNorm2d):
        bn.momentum = None
        if bn.weight is None:
            bn.bias = nn.Parameter(torch.randn(bn.num_features, dtype=torch.float64))


def normalise_weights_of_reductions(net):
    for op in (module for module in net.modules() if type(module) is FactorizedReduce):
        for conv in (op.conv1, op.conv2):
            nn.utils.weight_norm(conv).weight_g.data.mul_(2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("change", [give_bn_a_bias_alone_and_average_over_all_batches, normalise_weights_of_reductions])
def test_changed_parts_of_operations_run_under_both_executions(change, layout, recompute):
    values = {}
    for execution in EXECUTIONS:
        net = network(SearchCNN, execution)
        net.recompute = recompute and execution == "fused"
        torch.manual_seed(1)
        change(net)
        loss = net.loss(*batch())
        loss.backward()
        gradients = {f"d {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        values[execution] = {"loss": loss} | gradients | dict(net.named_buffers())
    for name, value in values["plain"].items():
        torch.testing.assert_close(values["fused"][name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_an_operation_counts_in_a_buffer_is_counted_once(recompute, monkeypatch):
    class Counting(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = stride
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return x[:, :, :: self.stride, :: self.stride]

    monkeypatch.setitem(OPS, "counting", lambda C, stride, affine: Counting(stride))
    net = network(SearchCNN, "fused", ["counting", "sep_conv_3x3"])
    net.recompute = recompute
    net.loss(*batch()).backward()
    assert {op.passes.item() for op in net.modules() if isinstance(op, Counting)} == {1}


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [lambda w: F.one_hot(w.argmax(-1), w.shape[-1]), lambda w: w.float(), lambda w: w[..., None, None]],
    ids=["one-hot integers", "float32", "of more dimensions"],
)
def test_weights_of_other_types_and_shapes_mean_the_same_under_both_executions(change, layout):
    class Changed(SearchCNN):
        def edge_weights(self, noise=None):
            return {kind: [change(w) for w in ws] for kind, ws in super().edge_weights().items()}

    plain, fused = (network(Changed, execution)(batch()[0]) for execution in ("plain", "fused"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.long
@both_executions
def test_a_search_with_frozen_weights_leaves_them_and_moves_the_others(execution):
    net = network(SearchCNN, execution)
    net.stem.requires_grad_(False)
    before = {name: value.clone() for name, value in net.named_parameters()}
    two_steps(net)
    moved = {name for name, value in net.named_parameters() if (value != before[name]).any()}
    assert moved == {name for name in before if not name.startswith("stem")}


@pytest.mark.long
@both_executions
@pytest.mark.parametrize(
    "primitives",
    [("none", "max_pool_3x3"), ("dil_conv_5x5",), tuple(OPS), tuple(reversed(PRIMITIVES))],
    ids=lambda primitives: f"{len(primitives)} from {primitives[0]}",
)
def test_any_search_space_is_searched(primitives, execution):
    net = network(SearchCNN, execution, primitives)
    gradients = two_steps(net)
    assert all(gradient.shape[1] == len(primitives) and gradient.isfinite().all() for gradient in gradients)
    genotype = net.genotype(k=1)
    assert {len(node) for node in genotype.normal} == {1}
    assert {op for node in genotype.normal for op, _ in node} <= set(primitives) - {"none"}
