"""The fused execution of the search cell is the plain one, in float64, for whatever a cell may be."""

import copy
import functools
import itertools

import pytest
import torch
from conftest import batch, sgd, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from architect import Architect
from models.choices import PRIMITIVES
from models.costs import activation_bytes
from models.fast import search_cell
from models.ops import OPS, MixedOp, PartialMixedOp
from models.search_cells import SearchCell

# Sums in another order; a normalisation over few values of nearly no variance multiplies their rounding.
TOLERANCE = 1e-10


def plain_cell(n_nodes, C, reduction_p=False, reduction=False, training=True, primitives=PRIMITIVES, mixed_op=MixedOp):
    """A cell with running statistics that a batch would not give."""
    cell = SearchCell(n_nodes, 5, 4, C, reduction_p, reduction, primitives, "plain", mixed_op).double().train(training)
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return cell


def fused_copy(cell):
    fused = copy.deepcopy(cell)
    fused.execution = "fused"
    return fused


def inputs_of(cell, N, size, memory_format=torch.channels_last):
    """States s0 and s1, and weights of the edges. Before s1 came a reduction cell if `preproc0` halves the size."""
    height, width = size
    halves = not isinstance(cell.preproc0, nn.Sequential)
    s0 = torch.randn(N, 5, *((2 * height - height % 2, 2 * width) if halves else size), dtype=torch.float64)
    s1 = torch.randn(N, 4, height, width, dtype=torch.float64)
    weights = [torch.randn(len(node), len(node[0]._ops), dtype=torch.float64).softmax(-1) for node in cell.dag]
    return s0.to(memory_format=memory_format), s1.to(memory_format=memory_format), weights


def results(cell, s0, s1, weights):
    """name -> tensor: output, all gradients, and the buffers after it."""
    s0, s1, *weights = (tensor.clone().requires_grad_() for tensor in (s0, s1, *weights))
    output = cell(s0, s1, weights)
    towards = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    named = {"s0": s0, "s1": s1} | {f"weights of node {i}": w for i, w in enumerate(weights)}
    named |= dict(cell.named_parameters())
    grads = torch.autograd.grad(output, list(named.values()), towards, allow_unused=True, materialize_grads=True)
    return {"output": output} | {f"d {name}": grad for name, grad in zip(named, grads)} | dict(cell.named_buffers())


def assert_fused_is_plain(cell, *inputs, except_for="nothing"):
    found, expected = results(fused_copy(cell), *inputs), results(cell, *inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if except_for not in name:
            difference = (found[name] - value).double().norm()
            assert difference <= TOLERANCE * value.double().norm() + 1e-13, (name, difference, value.double().norm())


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(
    n_nodes=st.integers(1, 5),
    C=st.integers(2, 17),
    share=st.sampled_from([1, 2]),  # one in so many channels has candidates
    N=st.integers(1, 70),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    reduction_p=st.booleans(),
    reduction=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
    memory_format=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
@pytest.mark.parametrize("name", ["EDGE_BY_EDGE", "BATCHED"])
def test_any_cell_is_the_plain_cell(
    name, n_nodes, C, share, N, size, reduction_p, reduction, training, seed, memory_format
):
    torch.manual_seed(seed)
    mixed_op = functools.partial(PartialMixedOp, K=share) if share > 1 else MixedOp
    cell = plain_cell(n_nodes, share * C, reduction_p, reduction, training, mixed_op=mixed_op)
    N = max(4, min(N, 1000 // (size[0] * size[1])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, name))
        assert_fused_is_plain(cell, *inputs_of(cell, N, size, memory_format))


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("name", [name for name in OPS if name != "none"])
def test_every_operation_is_the_plain_one_alone_and_with_another(name, reduction, training, layout):
    torch.manual_seed(0)
    for primitives in ([name], ["none", name, "conv_7x1_1x7"]):
        cell = plain_cell(2, 3, False, reduction, training, primitives)
        assert_fused_is_plain(cell, *inputs_of(cell, 3, (7, 6)))


@pytest.mark.parametrize(
    ("N", "size"),
    [(4, (1, 1)), (4, (2, 2)), (4, (1, 5)), (4, (3, 2)), (4, (13, 13)), (1, (8, 8)), (70, (3, 4))],
)
def test_images_down_to_a_pixel_and_batches_down_to_an_image(N, size, layout):
    for reduction in (False, True) if N > 1 else (False,):
        torch.manual_seed(0)
        cell = plain_cell(2, 2, False, reduction)
        assert_fused_is_plain(cell, *inputs_of(cell, N, size))


def test_operations_that_differ_from_edge_to_edge_run_by_themselves(layout):
    torch.manual_seed(0)
    cell = plain_cell(3, 4)
    cell.dag[1][1]._ops[3] = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()).double()
    cell.dag[0][0]._ops[0][0] = nn.MaxPool2d(5, 1, 2)
    cell.dag[2][0]._ops[5][3].eps = 0.1
    assert_fused_is_plain(cell, *inputs_of(cell, 3, (6, 6)))


def test_operations_changed_alike_on_all_edges_do_not_run_as_the_usual_ones(layout):
    """After cells with the usual ones have run, since what is known of those must not be used for these."""
    torch.manual_seed(0)
    cell = plain_cell(2, 4)
    inputs = inputs_of(cell, 3, (6, 6))
    fused_copy(cell)(*inputs)
    for mixed in itertools.chain(*cell.dag):
        sep_conv, dil_conv = mixed._ops[3], mixed._ops[5]
        sep_conv[1][3] = nn.BatchNorm2d(4).double()
        nn.init.constant_(sep_conv[1][3].weight, 3.0)
        dil_conv[2] = nn.Conv2d(4, 4, 1).double()
        mixed._ops[0].append(nn.Tanh())
    # BN subtracts what the bias adds, so that its gradient is rounding
    assert_fused_is_plain(cell, *inputs, except_for="ops.5.2.bias")


@pytest.mark.parametrize("source", [0, 2])  # one of several edges from a source, and the only one
@pytest.mark.parametrize("inside", [False, True])
def test_hooks_on_operations_are_called(layout, source, inside):
    cell = fused_copy(plain_cell(2, 4))
    seen, op = [], cell.dag[1][source]._ops[3]
    (op[0][1] if inside else op).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    cell(*inputs_of(cell, 3, (6, 6)))
    assert seen == [(3, 4, 6, 6)]


def net_of(execution="fused", **changes):
    return small_net(C=3, n_layers=3, execution=execution, **changes)


def second_order_step(net, memory_format=torch.contiguous_format):
    net.to(memory_format=memory_format)
    optim = sgd(net, steps=2)
    trn, val = batch(n=9, seed=1), batch(n=9, seed=2)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, optim)
    net.loss(*trn).backward(inputs=list(net.weights()))
    return {f"d {name}": p.grad for name, p in net.named_parameters()} | net.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_order_step_is_the_plain_one(recompute, layout):
    found = second_order_step(net_of(recompute=recompute), torch.channels_last)
    for name, value in second_order_step(net_of("plain")).items():
        # eq. 7 divides rounding by eps = 0.01 / ||d||
        assert torch.allclose(found[name], value, rtol=1e-8, atol=1e-11), name


def test_recomputing_keeps_less_and_can_be_done_twice(layout):
    X, y = batch(n=9)
    kept, recomputed = net_of(), net_of(recompute=True)
    assert activation_bytes(recomputed, X) < 0.3 * activation_bytes(kept, X)
    losses = [net.loss(X, y) for net in (kept, recomputed)]
    for retain in (True, False):
        expected, found = (
            torch.autograd.grad(loss, list(net.weights()), retain_graph=retain)
            for loss, net in zip(losses, (kept, recomputed))
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_mixed_precision_on_the_cpu_is_finite_and_near():
    plain, fused = net_of("plain", dtype=torch.float32), net_of(dtype=torch.float32)
    X, y = batch(n=9, dtype=torch.float32)
    exact = plain.loss(X, y).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused.to(memory_format=torch.channels_last).loss(X.to(memory_format=torch.channels_last), y)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad.isfinite().all() for p in fused.parameters())


def test_weights_changed_before_the_backward_pass_are_noticed(layout):
    net = net_of()
    loss = net.loss(*batch(n=4))
    with torch.no_grad():
        for weight in net.weights():
            weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"(inplace|in place)"):
        loss.backward()
