"""Eq. 6 and 7 against exact differentiation, and what an architect step must leave alone."""

import copy

import pytest
import torch
from conftest import batch, sgd, small_net
from exact import by_definition, hessian_product
from torch.func import functional_call

from architect import Architect

XI = 0.1


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_error(found, exact):
    exact = flat(exact)
    return ((flat(found) - exact).norm() / exact.norm()).item()


def unrolled(net, names, trn, xi, optim, momentum, weight_decay):
    """w'(alpha) as a differentiable function of alpha, by the names of the weights. net: `by_definition`."""
    weights = dict(net.named_parameters())
    grads = torch.autograd.grad(net.loss(*trn), [weights[name] for name in names], create_graph=True)
    buffers = [optim.state[weights[name]].get("momentum_buffer", 0.0) for name in names]
    return {
        name: weights[name].detach() - xi * (momentum * buf + grad + weight_decay * weights[name].detach())
        for name, grad, buf in zip(names, grads, buffers)
    }


def copies(net, optim):
    """The network by its definition, and its weights' optimizer with the same momentum buffers."""
    twin = by_definition(copy.deepcopy(net))
    twin_optim = torch.optim.SGD(twin.weights(), 0.1, momentum=0.9)
    twin_optim.load_state_dict(optim.state_dict())
    return twin, twin_optim


def exact_alpha_gradient(net, trn, val, xi, optim, momentum=0.9, weight_decay=3e-4):
    """Differentiation straight through the virtual step."""
    net, optim = copies(net, optim)
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha")]
    w_virtual = unrolled(net, names, trn, xi, optim, momentum, weight_decay)
    loss = net.criterion(functional_call(net, w_virtual, (val[0],)), val[1])
    return torch.autograd.grad(loss, list(net.alphas()))


def test_hessian_product_is_eq_7_to_a_millionth_of_exact_double_differentiation():
    net, trn = small_net(smooth=True), batch()
    torch.manual_seed(1)
    d = [torch.randn_like(w) for w in net.weights()]
    found = Architect(net, 0.9, 3e-4, eps_scale=1e-5).compute_hessian(d, *trn)
    # truncation is of order eps^2 = 1e-10 of the third derivatives, rounding of 1e-16 / 1e-5: far below 1e-6
    assert relative_error(found, hessian_product(net, d, trn)) < 1e-6


@pytest.mark.parametrize("steps", [0, 2], ids=["first step, no momentum buffer", "with momentum buffers"])
def test_alpha_gradient_is_eq_6_to_a_millionth_of_differentiating_through_the_virtual_step(steps):
    net, trn, val = small_net(smooth=True), batch(seed=1), batch(seed=2)
    optim = sgd(net, steps=steps)
    exact = exact_alpha_gradient(net, trn, val, XI, optim)
    Architect(net, 0.9, 3e-4, eps_scale=1e-5).unrolled_backward(*trn, *val, XI, optim)
    assert relative_error([alpha.grad for alpha in net.alphas()], exact) < 1e-6


def test_second_order_differs_from_first_order_at_the_virtual_weights():
    # the division by (2 eps) in eq. 7: with `/ 2 * eps` the Hessian term vanishes, and only this part would be left
    net, trn, val = small_net(smooth=True), batch(seed=1), batch(seed=2)
    optim = sgd(net, steps=2)
    exact = exact_alpha_gradient(net, trn, val, XI, optim)
    net, optim = copies(net, optim)
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha")]
    at_virtual = {k: w.detach() for k, w in unrolled(net, names, trn, XI, optim, 0.9, 3e-4).items()}
    loss = net.criterion(functional_call(net, at_virtual, (val[0],)), val[1])
    without_hessian = torch.autograd.grad(loss, list(net.alphas()))
    assert relative_error(without_hessian, exact) > 1e-3  # so that the test above does measure H


def test_first_order_is_plain_autograd():
    net, trn, val = small_net(), batch(seed=1), batch(seed=2)
    exact = torch.autograd.grad(net.loss(*val), list(net.alphas()))
    loss = Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.0, sgd(net))
    for alpha, gradient in zip(net.alphas(), exact):
        assert torch.equal(alpha.grad, gradient)
    assert loss.item() == net.loss(*val).item()


@pytest.mark.parametrize("steps", [0, 3])
def test_virtual_step_is_the_step_that_the_optimizer_would_take(steps):
    net, trn = small_net(), batch(seed=1)
    optim = sgd(net, lr=XI, steps=steps)
    w_virtual = Architect(net, 0.9, 3e-4).virtual_step(*trn, XI, optim)
    net.loss(*trn).backward(inputs=list(net.weights()))
    optim.step()
    assert relative_error(w_virtual, net.weights()) < 1e-14


@pytest.mark.parametrize("xi", [0.0, XI], ids=["first order", "second order"])
@pytest.mark.parametrize("steps", [0, 2])
def test_architect_step_leaves_network_statistics_and_optimizer_bit_identical(steps, xi):
    net = small_net(dtype=torch.float32)
    optim = sgd_of(net)
    for step in range(steps):
        net.loss(*batch(seed=step, dtype=torch.float32)).backward()
        optim.step()
    optim.zero_grad()
    before, optim_before = copy.deepcopy(net.state_dict()), copy.deepcopy(optim.state_dict())
    trn, val = batch(seed=8, dtype=torch.float32), batch(seed=9, dtype=torch.float32)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, xi, optim)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert optim.state_dict().keys() == optim_before.keys()
    for p, state in optim.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], optim_before["state"][p]["momentum_buffer"])
    assert len(optim.state_dict()["state"]) == len(optim_before["state"])
    assert all(w.grad is None for w in net.weights())
    assert any(alpha.grad.any() for alpha in net.alphas())


def test_weights_come_back_when_a_loss_fails_midway():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="batch_size"):
        Architect(net, 0.9, 3e-4).unrolled_backward(*batch(), batch()[0], batch(n=2)[1], XI, sgd(net))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_hessian_product_of_a_zero_direction_is_zero():
    net = small_net()
    hessian = Architect(net, 0.9, 3e-4).compute_hessian([torch.zeros_like(w) for w in net.weights()], *batch())
    assert all(torch.equal(h, torch.zeros_like(alpha)) for h, alpha in zip(hessian, net.alphas()))


def test_gradient_of_alphas_that_no_cell_uses_is_zero():
    net = small_net(n_layers=2)  # cells 0 and 1 are both reduction cells
    Architect(net, 0.9, 3e-4).unrolled_backward(*batch(), *batch(seed=1), XI, sgd(net))
    assert all(not alpha.grad.any() for alpha in net.alpha_normal)
    assert all(alpha.grad.any() for alpha in net.alpha_reduce)


def test_hessian_product_runs_at_full_precision_under_autocast():
    net, trn = small_net(dtype=torch.float32), batch(dtype=torch.float32)
    d = torch.autograd.grad(net.loss(*trn), list(net.weights()))
    architect = Architect(net, 0.9, 3e-4)
    full = architect.compute_hessian(d, *trn)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = architect.compute_hessian(d, *trn)
    assert all(torch.equal(a, b) for a, b in zip(full, mixed))


def test_validation_loss_is_at_the_virtual_weights_under_autocast_too():
    # autocast caches bf16 casts of the weights; those of w must not be used at w'
    net, trn, val = small_net(dtype=torch.float32), batch(dtype=torch.float32), batch(seed=1, dtype=torch.float32)
    optim, architect, xi = sgd_of(net), Architect(net, 0.9, 3e-4), 0.5
    at_w = net.loss(*val).item()
    exact = architect.unrolled_backward(*trn, *val, xi, optim).item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = architect.unrolled_backward(*trn, *val, xi, optim).item()
    assert abs(exact - at_w) > 0.05
    assert abs(mixed - exact) < 0.2 * abs(exact - at_w)


def sgd_of(net):
    return torch.optim.SGD(net.weights(), XI, momentum=0.9, weight_decay=3e-4)


def test_architect_gives_the_same_for_channels_last_networks_and_batches():
    net, trn, val = small_net(smooth=True, C_in=3), batch(channels=3), batch(channels=3, seed=1)
    architect, optim = Architect(net, 0.9, 0.0), torch.optim.SGD(net.weights(), XI)
    architect.unrolled_backward(*trn, *val, XI, optim)
    expected = [alpha.grad for alpha in net.alphas()]
    net.to(memory_format=torch.channels_last)
    trn, val = ((X.to(memory_format=torch.channels_last), y) for X, y in (trn, val))
    architect.unrolled_backward(*trn, *val, XI, optim)
    assert relative_error([alpha.grad for alpha in net.alphas()], expected) < 1e-8
