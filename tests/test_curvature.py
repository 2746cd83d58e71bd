"""The dominant eigenvalue of the Hessian of L_val in alpha, against the whole Hessian."""

import copy
import logging

import numpy as np
import pytest
import torch
from conftest import batch, small_net
from exact import by_definition

from evidence.curvature import MAX_PIXELS, dominant_eigenvalue, images_within, lanczos
from models.sync_bn import refuse_second_derivatives, synchronise


def eigenvalues_of_the_hessian(net, X, y):
    """All of them, by autograd: the Hessian's rows one by one."""
    net = by_definition(copy.deepcopy(net)).train()

    def flat_gradient(value):
        gradient = torch.autograd.grad(value, list(net.alphas()), create_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in gradient])

    rows = [flat_gradient(element) for element in flat_gradient(net.loss(X, y))]
    return np.linalg.eigvalsh(torch.stack(rows).detach().numpy())


@pytest.mark.long
@pytest.mark.parametrize(
    ("smooth", "execution", "n_layers"), [(True, "fused", 3), (False, "plain", 3), (True, "fused", 1)]
)
def test_the_eigenvalue_is_that_of_largest_magnitude_of_the_whole_hessian(smooth, execution, n_layers):
    net = small_net(smooth=smooth, execution=execution, n_layers=n_layers)
    X, y = batch()
    expected = max(eigenvalues_of_the_hessian(net, X, y), key=abs)
    # Lanczos's bound on the error is 1e-8 of the eigenvalue; float64 leaves 1e-10
    assert dominant_eigenvalue(net, X, y, tolerance=1e-8, max_products=200) == pytest.approx(expected, rel=1e-6)


def test_bn_over_ranks_and_recomputation_change_nothing():
    net, other = small_net(), small_net(recompute=True)
    synchronise(other)
    assert dominant_eigenvalue(other, *batch()) == pytest.approx(dominant_eigenvalue(net, *batch()), rel=1e-12)


def test_the_network_and_the_random_numbers_are_left_as_they_were():
    net = small_net(recompute=True).eval()
    net.noise = noise = object()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert isinstance(dominant_eigenvalue(net, *batch()), float)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.noise is noise
    assert net.recompute
    assert not any(module.training for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        refuse_second_derivatives()
        return g.clone()


def test_an_operation_without_second_derivative_costs_the_eigenvalue_not_the_run(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("darts"), "propagate", True)
    net = small_net()
    net.cells[1].dag[0][0].register_forward_hook(lambda edge, inputs, output: Once.apply(output))
    with caplog.at_level(logging.INFO, logger="darts"):
        assert dominant_eigenvalue(net, *batch()) is None
    assert "could not be computed" in caplog.text


@pytest.mark.parametrize("sign", [1, -1])
def test_lanczos_finds_the_eigenvalue_of_largest_magnitude_of_a_random_matrix(sign):
    for seed in range(5):
        A = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        A = sign * (A + A.T + 8 * torch.outer(A[0], A[0]))
        expected = max(np.linalg.eigvalsh(A.numpy()), key=abs)
        start = torch.ones(30, dtype=torch.float64)
        result = lanczos(A.matmul, start, tolerance=1e-10, max_products=30)
        assert result == pytest.approx(expected, rel=1e-9)


def test_lanczos_of_zero_and_of_a_single_number():
    assert lanczos(torch.zeros_like, torch.ones(4), 1e-6, 10) == 0
    assert lanczos(lambda v: -3 * v, torch.ones(1), 1e-6, 10) == pytest.approx(-3)


def test_fewer_images_of_large_ones_are_used():
    assert images_within(8, 32) == images_within(8, 8) == 8
    assert images_within(100, 32) * 32**2 == MAX_PIXELS
    assert images_within(8, 224) == 2
    assert images_within(0, 32) == 0
