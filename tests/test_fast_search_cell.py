"""The fused execution of the search cell is the plain one, in float64, for whatever a cell may be."""

import copy
import itertools

import pytest
import torch
from conftest import batch, sgd, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Launches
from torch import nn

from architect import Architect
from images.loading import Loader
from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import OPS, PartialMixedOp
from models.search_cells import SearchCell
from models.search_cnn import SearchCNN
from utils import get_data

# Sums in another order; a normalisation over few values of nearly no variance multiplies their rounding.
TOLERANCE = 1e-10

PATHS = {"edge by edge": search_cell.EDGE_BY_EDGE, "batched, as on CUDA": search_cell.BATCHED}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: PATHS[request.param])


def cells(n_nodes, C, reduction_p, reduction, training=True, C_pp=5, C_p=4, primitives=PRIMITIVES):
    """The same cell in both executions, with running statistics that a batch would not give."""
    plain = SearchCell(n_nodes, C_pp, C_p, C, reduction_p, reduction, primitives, "plain").double().train(training)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fused = copy.deepcopy(plain)
    fused.execution = "fused"
    return plain, fused


def results(cell, s0, s1, weights, memory_format=torch.contiguous_format):
    """name -> tensor: output, all gradients, and the buffers after it."""
    inputs = [s.to(memory_format=memory_format).requires_grad_() for s in (s0.clone(), s1.clone())]
    weights = [w.clone().requires_grad_() for w in weights]
    output = cell(*inputs, weights) + 0 * weights[0].sum()  # none alone has no gradient in the plain cell
    towards = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    named = {"s0": inputs[0], "s1": inputs[1], **{f"weights of node {i}": w for i, w in enumerate(weights)}}
    named |= dict(cell.named_parameters())
    grads = torch.autograd.grad(output, list(named.values()), towards, allow_unused=True, materialize_grads=True)
    return {"output": output} | {f"d {name}": grad for name, grad in zip(named, grads)} | dict(cell.named_buffers())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).double().norm()
        assert difference <= TOLERANCE * value.double().norm() + 1e-13, (name, difference, value.double().norm())


def check_cell(
    n_nodes,
    C,
    N,
    size,
    reduction_p,
    reduction,
    training=True,
    memory_format=torch.channels_last,
    seed=0,
    primitives=PRIMITIVES,
):
    torch.manual_seed(seed)
    plain, fused = cells(n_nodes, C, reduction_p, reduction, training, primitives=primitives)
    height, width = size
    s0_size = (2 * height - height % 2, 2 * width) if reduction_p else size  # halved to the size of s1
    s0 = torch.randn(N, 5, *s0_size, dtype=torch.float64)
    s1 = torch.randn(N, 4, height, width, dtype=torch.float64)
    weights = [torch.randn(i + 2, len(primitives), dtype=torch.float64).softmax(-1) for i in range(n_nodes)]
    assert_same(results(fused, s0, s1, weights, memory_format), results(plain, s0, s1, weights))


shapes = {
    "n_nodes": st.integers(1, 5),
    "C": st.integers(2, 17),
    "N": st.integers(1, 70),
    "reduction_p": st.booleans(),
    "reduction": st.booleans(),
    "seed": st.integers(0, 2**31),
    "memory_format": st.sampled_from([torch.channels_last, torch.contiguous_format]),
}


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(2, 9), st.integers(2, 9)), training=st.booleans(), **shapes)
def test_any_cell_is_the_plain_cell(size, N, **drawn):
    pixels = size[0] * size[1]
    check_cell(size=size, N=max(4, min(N, 1500 // pixels)), **drawn)


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(size=st.tuples(st.integers(3, 12), st.integers(3, 12)), **shapes)
@pytest.mark.parametrize("which", PATHS)
def test_any_cell_is_the_plain_cell_on_every_path(which, size, N, **drawn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_cell, "layout_for", lambda x: PATHS[which])
        check_cell(size=size, N=max(3, min(N, 700 // (size[0] * size[1]))), **drawn)


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_every_operation_alone_is_the_plain_one(name, reduction, training, path):
    check_cell(2, 3, 3, (7, 6), False, reduction, training, primitives=[name])


@pytest.mark.long
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (3, 2), (4, 4), (13, 13), (16, 16)])
def test_images_down_to_a_pixel(size, path):
    check_cell(2, 2, 4, size, False, False)
    check_cell(2, 2, 4, size, False, True)


def test_a_batch_of_one_and_of_seventy(path):
    check_cell(1, 2, 1, (8, 8), False, False)
    check_cell(1, 2, 70, (3, 4), False, True)


def test_edges_that_differ_run_by_themselves(path):
    torch.manual_seed(0)
    plain, _ = cells(3, 4, False, False)
    odd = plain.dag[1][1]._ops
    odd[3] = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()).double()  # for a separable convolution
    plain.dag[0][0]._ops[0][0] = nn.MaxPool2d(5, 1, 2)
    plain.dag[2][0]._ops[5][3].eps = 0.1
    fused = copy.deepcopy(plain)
    fused.execution = "fused"
    s0, s1 = torch.randn(3, 5, 6, 6, dtype=torch.float64), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    weights = [torch.rand(i + 2, 8, dtype=torch.float64) for i in range(3)]
    assert_same(results(fused, s0, s1, weights), results(plain, s0, s1, weights))


@pytest.mark.parametrize("training", [True, False])
def test_edges_with_different_shares_of_the_channels_are_the_plain_ones(training, path):
    torch.manual_seed(0)
    plain, fused = cells(2, 8, False, False, training)
    for cell in (plain, fused):
        for node, source, K in ((0, 0, 4), (0, 1, 4), (1, 0, 4), (1, 1, 4), (1, 2, 2)):
            cell.dag[node][source] = PartialMixedOp(8, 1, K=K).double().train(training)
    fused.load_state_dict(plain.state_dict())
    s0, s1 = torch.randn(3, 5, 6, 6, dtype=torch.float64), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    weights = [torch.rand(i + 2, 8, dtype=torch.float64) for i in range(2)]
    assert_same(results(fused, s0, s1, weights), results(plain, s0, s1, weights))


def test_operations_changed_alike_on_all_edges_do_not_run_as_the_usual_ones(path):
    """After cells with the usual ones have run, whose way these must not take."""
    torch.manual_seed(0)
    plain, _ = cells(2, 4, False, False)
    s0, s1 = torch.randn(3, 5, 6, 6, dtype=torch.float64), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    weights = [torch.rand(i + 2, 8, dtype=torch.float64) for i in range(2)]
    usual = copy.deepcopy(plain)
    usual.execution = "fused"
    usual(s0, s1, weights)
    for mixed in itertools.chain(*plain.dag):
        sep_conv, dil_conv = mixed._ops[3], mixed._ops[5]
        sep_conv[1][3] = nn.BatchNorm2d(4).double()
        nn.init.constant_(sep_conv[1][3].weight, 3.0)
        dil_conv[2] = nn.Conv2d(4, 4, 1).double()
        mixed._ops[0].append(nn.Tanh())
    fused = copy.deepcopy(plain)
    fused.execution = "fused"
    found, expected = results(fused, s0, s1, weights), results(plain, s0, s1, weights)
    # BN takes off what such a bias adds, so that its gradient is rounding
    names = [name for name in expected if "ops.5.2.bias" not in name]
    assert_same({name: found[name] for name in names}, {name: expected[name] for name in names})


@pytest.mark.parametrize("source", [0, 2])  # one of several edges from a source, and the only one
@pytest.mark.parametrize("inside", [False, True])
def test_hooks_on_operations_are_called(path, source, inside):
    _, cell = cells(2, 4, False, False)
    seen, op = [], cell.dag[1][source]._ops[3]
    (op[0][1] if inside else op).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    weights = [torch.rand(i + 2, 8, dtype=torch.float64) for i in range(2)]
    cell(*(torch.randn(3, c, 6, 6, dtype=torch.float64) for c in (5, 4)), weights)
    assert seen == [(3, 4, 6, 6)]


def test_states_of_different_sizes_are_refused(path):
    _, cell = cells(2, 4, False, False)
    with pytest.raises((ValueError, RuntimeError)):
        cell(
            torch.randn(3, 5, 6, 6).double(),
            torch.randn(3, 4, 5, 5).double(),
            [torch.rand(i + 2, 8).double() for i in (0, 1)],
        )


def test_too_few_values_to_normalise_are_refused(path):
    _, cell = cells(1, 2, False, False)
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        cell(*(torch.randn(1, c, 1, 1, dtype=torch.float64) for c in (5, 4)), [torch.rand(2, 8).double()])


def nets(**changes):
    plain = small_net(C=3, n_layers=3, execution="plain", **changes)
    return plain, small_net(C=3, n_layers=3, **changes)


def second_order_step(net, memory_format=torch.contiguous_format):
    net.to(memory_format=memory_format)
    optim = sgd(net, steps=2)
    trn, val = batch(n=9, seed=1), batch(n=9, seed=2)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, optim)
    net.loss(*trn).backward(inputs=list(net.weights()))
    named = dict(net.named_parameters())
    return {f"d {name}": p.grad for name, p in named.items()} | net.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_order_step_is_the_plain_one(recompute, path):
    plain, fused = nets(smooth=True)
    fused.recompute = recompute
    found, expected = second_order_step(fused, torch.channels_last), second_order_step(plain)
    for name, value in expected.items():
        # eq. 7 divides rounding by eps = 0.01 / ||d||
        assert torch.allclose(found[name], value, rtol=1e-8, atol=1e-11), name


@pytest.mark.long
def test_recomputing_gives_the_same_bits_and_records_statistics_once(path):
    kept, recomputed = nets()[1], nets()[1]
    recomputed.recompute = True
    found, expected = second_order_step(recomputed), second_order_step(kept)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_move_between_the_executions():
    plain, fused = nets()
    X, y = batch(n=9)
    for first, second in ((plain, fused), (fused, plain)):
        second_order_step(first)
        second.load_state_dict(first.state_dict(), strict=True)
        for training in (True, False):
            a, b = (net.train(training).loss(X, y).item() for net in (first, second))
            assert a == pytest.approx(b, rel=1e-12)


def test_executions_are_fused_and_plain():
    assert EXECUTIONS == ("fused", "plain")
    assert small_net().cells[0].execution == "fused"
    with pytest.raises(ValueError, match="fused, plain"):
        small_net(execution="faster")


def test_mixed_precision_on_the_cpu_is_finite_and_near():
    plain, fused = nets(dtype=torch.float32)
    X, y = batch(n=9, dtype=torch.float32)
    exact = plain.loss(X, y).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused.to(memory_format=torch.channels_last).loss(X.to(memory_format=torch.channels_last), y)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.long
def test_a_search_on_digits_finds_the_same_genotype():
    _, _, n_classes, data = get_data("digits", "", 0, False, seed=0)
    loader = Loader(data, range(600), 50, torch.device("cpu"), seed=0)
    batches = [(X.double(), y) for X, y, _ in loader.epoch(1)]
    found = []
    for execution in EXECUTIONS:
        net = small_net(C=4, n_nodes=3, n_classes=n_classes, execution=execution)
        w_optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4)
        alpha_optim = torch.optim.Adam(net.alphas(), 0.03, betas=(0.5, 0.999))
        architect = Architect(net, 0.9, 3e-4)
        for trn, val in zip(batches[::2], batches[1::2]):
            architect.unrolled_backward(*trn, *val, 0.025, w_optim)
            alpha_optim.step()
            w_optim.zero_grad()
            net.loss(*trn).backward(inputs=list(net.weights()))
            w_optim.step()
        found.append((net.genotype(), torch.cat([alpha.detach().flatten() for alpha in net.alphas()])))
    (fused, fused_alphas), (plain, plain_alphas) = found
    assert fused == plain
    assert (fused_alphas - plain_alphas).abs().max() < 1e-6  # of moves by 0.03 a step


@pytest.mark.long
def test_the_path_of_cuda_launches_a_quarter_of_the_plain_operations(monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)
    counts = {}
    for execution in EXECUTIONS:
        net = small_net(n_layers=8, n_nodes=4, dtype=torch.float32, execution=execution)
        with Launches() as counter:
            net.loss(*batch(dtype=torch.float32)).backward()
        counts[execution] = counter.count
    assert counts["fused"] <= counts["plain"] / 4


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize(("C", "size"), [(2, 8), (3, 5), (8, 8), (8, 12), (3, 12)])
def test_float32_bits_are_the_same_in_every_run(C, size, path, two_threads):
    torch.manual_seed(0)
    net = SearchCNN(1, C, 10, 3, nn.CrossEntropyLoss(), n_nodes=2).to(memory_format=torch.channels_last)
    X = torch.randn(64, 1, size, size)
    y = torch.randint(10, (64,))

    def gradients(i):
        torch.rand(1000 + 9876 * i)  # memory that was used before
        return torch.autograd.grad(net.loss(X, y), list(net.parameters()), allow_unused=True, materialize_grads=True)

    first = gradients(0)
    for i in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(i)))


def kept_bytes(net, X, y):
    """What a forward pass keeps for the backward pass, in bytes, and the loss."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its place in memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net.loss(X, y)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), loss


def test_recomputing_keeps_less_and_can_be_done_twice(path):
    X, y = batch(n=9)
    kept, recomputed = nets()[1], nets()[1]
    recomputed.recompute = True
    much, expected = kept_bytes(kept, X, y)
    less, loss = kept_bytes(recomputed, X, y)
    assert less < 0.3 * much
    weights, twins = list(recomputed.weights()), list(kept.weights())
    for retain in (True, False):
        gradients = torch.autograd.grad(loss, weights, retain_graph=retain)
        again = torch.autograd.grad(expected, twins, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again))


def test_weights_changed_before_the_backward_pass_are_noticed(path):
    net = small_net(C=3, n_layers=3)
    loss = net.loss(*batch(n=4))
    with torch.no_grad():
        for weight in net.weights():
            weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"(inplace|in place)"):
        loss.backward()
