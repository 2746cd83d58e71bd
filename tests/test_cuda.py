"""What must hold on a GPU: the CPU's numbers, eq. 7's precision, one wait a step, the same bits when resumed."""

import subprocess
import sys

import pytest
import torch
from comparing import differences
from conftest import ROOT, Batches, batch, run_script, small_net
from epochs import augment_epoch, search_epoch
from torch import nn

from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2
from models.augment_cnn import AugmentCNN
from models.ops import OPS
from models.search_cnn import SearchCNN
from models.sync_bn import synchronise
from run.checkpoints import load_checkpoint

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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_every_op_and_its_gradient_are_the_same_as_on_the_cpu(name, stride, memory_format):
    torch.manual_seed(0)
    op, x, found = OPS[name](4, stride, True).double(), torch.randn(2, 4, 9, 9, dtype=torch.float64), []
    for device in ("cpu", "cuda"):
        op, image = op.to(device), x.to(device, memory_format=memory_format).requires_grad_()
        y = op(image)
        weighted = (y * torch.arange(y.numel(), device=device).view_as(y)).sum()
        (gradient,) = torch.autograd.grad(weighted + 0 * image.sum(), image)  # the sum, since `none` has no gradient
        found.append((y.cpu(), gradient.cpu()))
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.process
@pytest.mark.parametrize("words", ["", "--amp", pytest.param("--device cuda:1", marks=needs_two)])
def test_search_and_augment_run_on_cuda_and_the_search_resumes_on_the_cpu(words, tmp_path):
    search = run_script("search.py", *TINY, *words.split(), cwd=tmp_path)
    assert search.returncode == 0, search.stderr
    assert "device cuda" in search.stdout
    augment = run_script("augment.py", *TINY, *words.split(), "--genotype", "runs/search/digits", cwd=tmp_path)
    assert augment.returncode == 0, augment.stderr
    resume = ("--resume", "runs/search/digits", "--device", "cpu", "--epochs", 3)
    process = run_script("search.py", *resume, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def small_default_net(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return SearchCNN(1, 8, 10, 5, nn.CrossEntropyLoss(), **changes).to("cuda", dtype, memory_format=torch.channels_last)


def digits_batch(seed, dtype=torch.float32):
    X, y = batch(n=64, n_classes=10, dtype=torch.float32, seed=seed)
    return X.to("cuda", dtype, memory_format=torch.channels_last), y.cuda()


@pytest.mark.parametrize("allowed", [False, True], ids=["as PyTorch comes", "TF32 allowed everywhere"])
def test_eq_7_in_float32_is_within_2_percent_of_float64(allowed, request):
    if allowed:
        request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
        torch.set_float32_matmul_precision("high")
    exact_net = small_default_net(torch.float64)
    d = torch.autograd.grad(exact_net.loss(*digits_batch(2, torch.float64)), list(exact_net.weights()))
    results = []
    for dtype in (torch.float32, torch.float64):
        architect = Architect(small_default_net(dtype), 0.9, 3e-4)
        hessian = architect.compute_hessian([g.to(dtype) for g in d], *digits_batch(1, dtype))
        results.append(torch.cat([h.flatten().double() for h in hessian]))
    found, exact = results
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("stage", ["search", "augment"])
@pytest.mark.parametrize("words", ["", "--amp", "--sync-bn", "--cuda-graphs off"])
def test_a_step_waits_for_the_gpu_once(stage, words, monkeypatch):
    reads = []

    def read(tensor):  # the one read of a step; outside it any wait is an error
        reads.append(len(tensor))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tensor.cpu().numpy().tolist()
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    batches = Batches(digits_batch(seed) for seed in range(4))
    if stage == "search":
        epoch = search_epoch(SearchConfig([*words.split(), "--device", "cuda"]), small_default_net(), batches)
    else:
        net = AugmentCNN(8, 1, 4, 10, 3, True, DARTS_V2).cuda().train()
        words = words.replace("--cuda-graphs off", "")
        epoch = augment_epoch(
            AugmentConfig(["--genotype", "DARTS_V2", *words.split(), "--device", "cuda"]), net, batches
        )
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == len(batches)


def assert_same_bits(one, other):
    state, expected = (load_checkpoint(run / "checkpoint.pt")["parts"]["net"] for run in (one, other))
    assert differences(state, expected) == []


@pytest.mark.process
@pytest.mark.parametrize(
    "words",
    [
        *("", "--order first", "--amp", "--recompute", "--amp --recompute"),
        *("--variant beta-darts", "--variant pc-darts --pc-warm-up 1"),
    ],
)
def test_cuda_graphs_give_the_bits_of_eager_steps(words, tmp_path):
    words = (*TINY, "--batch-size", 96, *words.split(), "--deterministic", "--runs-path", tmp_path)
    for graphs in ("auto", "off"):
        process = run_script("search.py", *words, "--cuda-graphs", graphs, "--name", graphs, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert ("no CUDA graphs" in process.stdout) == (graphs == "off")
    assert_same_bits(tmp_path / "search/auto", tmp_path / "search/off")


@pytest.mark.process
def test_a_resumed_run_has_the_same_bits_with_deterministic(tmp_path):
    words = (*TINY, "--deterministic", "--runs-path", tmp_path)
    for name, epochs in (("whole", 2), ("parts", 1)):
        process = run_script("search.py", *words, "--name", name, "--epochs", epochs, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    process = run_script("search.py", "--resume", tmp_path / "search/parts", "--epochs", 2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert_same_bits(tmp_path / "search/parts", tmp_path / "search/whole")


@pytest.mark.parametrize("changes", [{"recompute": True}, {"sync_bn": True}], ids=["--recompute", "--sync-bn"])
def test_options_change_no_gradient_on_cuda(changes):
    found = []
    for options in ({}, changes):
        net = small_default_net(torch.float64, recompute="recompute" in options)
        if "sync_bn" in options:
            synchronise(net)
        found.append(torch.autograd.grad(net.loss(*digits_batch(1, torch.float64)), list(net.parameters())))
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_an_augment_network_is_the_same_as_on_the_cpu_in_both_layouts(memory_format):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = AugmentCNN(8, 1, 4, 3, 3, True, DARTS_V2).double().to(device, memory_format=memory_format).train()
        X, y = (t.to(device) for t in batch())
        logits, aux_logits = net(X.to(memory_format=memory_format))
        loss = nn.functional.cross_entropy(logits, y) + nn.functional.cross_entropy(aux_logits, y)
        found.append([g.cpu() for g in torch.autograd.grad(loss, list(net.parameters()))])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.process
def test_nccl_of_one_rank_gives_a_run_with_sync_bn(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words = [ROOT / "search.py", *TINY, "--sync-bn", "--epochs", 1]
    process = subprocess.run(
        [*command, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr
