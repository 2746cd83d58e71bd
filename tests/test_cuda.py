"""What must hold on a GPU: the same step as on the CPU, both scripts, mixed precision, any of several devices."""

import json

import pytest
import torch
from conftest import batch, run_script, small_net

from architect import Architect
from models.ops import OPS, drop_path_

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
pytestmark = [pytest.mark.cuda, needs_cuda]

TINY = ("--layers", 3, "--init-channels", 4, "--batch-size", 128, "--epochs", 2)


def step_on(device):
    """Alphas' gradients and weights after a second-order step, in float64, where devices agree closely."""
    net = small_net(smooth=True).to(device)
    optim = torch.optim.SGD(net.weights(), 0.1, momentum=0.9, weight_decay=3e-4)
    net.loss(*(t.to(device) for t in batch(seed=100))).backward(inputs=list(net.weights()))
    optim.step()
    optim.zero_grad()
    trn, val = ([t.to(device) for t in batch(seed=seed)] for seed in (1, 2))
    Architect(net, 0.9, 3e-4, eps_scale=1e-3).unrolled_backward(*trn, *val, 0.1, optim)
    net.loss(*trn).backward(inputs=list(net.weights()))
    optim.step()
    return [alpha.grad.cpu() for alpha in net.alphas()], [w.detach().cpu() for w in net.weights()]


@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:1", marks=needs_two)])
def test_a_second_order_step_is_the_same_as_on_the_cpu(device):
    for found, expected in zip(step_on(device), step_on("cpu")):
        for a, b in zip(found, expected):
            # float64 sums in another order; eq. 7 divides their rounding by 2e-3
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)


def test_the_fused_cells_are_the_plain_ones_on_cuda():
    found = {}
    for execution in ("fused", "plain"):
        net = small_net(n_nodes=4, C=4, execution=execution).cuda()
        net.loss(*(t.cuda() for t in batch())).backward()
        found[execution] = [p.grad for p in net.parameters()] + list(net.buffers())
    for a, b in zip(found["fused"], found["plain"]):
        assert torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_every_op_is_the_same_as_on_the_cpu(name, stride):
    torch.manual_seed(0)
    op, x = OPS[name](4, stride, True).double(), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = op(x)
    assert torch.allclose(op.cuda()(x.cuda()).cpu(), expected, rtol=1e-9, atol=1e-12)


def test_drop_path_keeps_the_expected_share_on_cuda():
    x = torch.ones(20_000, 1, 1, 1, device="cuda")
    drop_path_(x, 0.25, training=True)
    assert abs((x == 0).float().mean().item() - 0.25) < 0.016  # five standard deviations


def test_architect_step_leaves_weights_bit_identical_under_mixed_precision():
    net = small_net(dtype=torch.float32).cuda()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trn, val = ([t.cuda() for t in batch(seed=seed, dtype=torch.float32)] for seed in (1, 2))
    optim = torch.optim.SGD(net.weights(), 0.1, momentum=0.9)
    with torch.autocast("cuda", torch.bfloat16):
        Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, optim)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(alpha.grad.isfinite().all() for alpha in net.alphas())


@pytest.mark.process
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--amp",),
        ("--order", "first"),
        pytest.param(("--device", "cuda:1"), marks=needs_two),
    ],
    ids=["float32", "mixed precision", "first order", "second device"],
)
def test_search_and_augment_run_on_cuda(words, tmp_path):
    search = run_script("search.py", *TINY, *words, cwd=tmp_path)
    assert search.returncode == 0, search.stderr
    assert "device cuda" in search.stdout
    words = [word for word in words if word not in ("--order", "first")]
    augment = run_script("augment.py", *TINY, *words, "--genotype", "runs/search/digits", cwd=tmp_path)
    assert augment.returncode == 0, augment.stderr
    for stage in ("search", "augment"):
        assert json.loads((tmp_path / f"runs/{stage}/digits/summary.json").read_text())["epochs"] == 2


@pytest.mark.process
def test_a_run_on_cuda_resumes_on_the_cpu(tmp_path):
    assert run_script("search.py", *TINY, cwd=tmp_path).returncode == 0
    process = run_script("search.py", "--resume", "runs/search/digits", "--device", "cpu", "--epochs", 3, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
