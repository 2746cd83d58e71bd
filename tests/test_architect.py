"""Eq. 6 and 7 against exact differentiation, and what an architect step must leave alone."""

import copy

import pytest
import torch
from conftest import batch, sgd, small_net
from exact import XI, exact_alpha_gradient, hessian_product, relative_error

from architect import Architect


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


def test_eq_7_shifts_w_by_the_same_length_whatever_the_length_of_d():
    net, trn = small_net(smooth=True), batch()
    d, architect = [torch.randn_like(w) for w in net.weights()], Architect(net, 0.9, 3e-4)
    once, tenfold = (architect.compute_hessian([factor * t for t in d], *trn) for factor in (1, 10))
    assert relative_error(tenfold, [10 * h for h in once]) < 1e-10  # rounding, divided by eps


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
