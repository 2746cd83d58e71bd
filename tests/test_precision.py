"""The passes of eq. 6 and 7 run in full float32, whatever the user has allowed, and leave that as it was."""

import contextlib

import pytest
import torch
from conftest import batch, sgd, small_net
from torch.utils._python_dispatch import TorchDispatchMode

import architect
from architect import Architect
from machine.precision import full_float32
from models.fast import search_cell

backends = torch.backends
if not hasattr(backends.cudnn, "conv"):
    pytest.skip("torch 2.9 has the settings that are read here", allow_module_level=True)


def set_new(**precisions):
    for name, precision in precisions.items():
        part = {"conv": backends.cudnn.conv, "matmul": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}[name]
        part.fp32_precision = precision


CHOICES = {
    "nothing": lambda: None,
    "cuDNN without TF32": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "cuBLAS with TF32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "new, all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "new, convolutions only": lambda: set_new(conv="ieee"),
    "new, both": lambda: set_new(conv="tf32", matmul="tf32"),
    "new, CPU": lambda: set_new(cpu="bf16"),
}
READERS = {
    "cuDNN": lambda: backends.cudnn.allow_tf32,
    "cuBLAS": lambda: backends.cuda.matmul.allow_tf32,
    "products": torch.get_float32_matmul_precision,
    "all": lambda: backends.fp32_precision,
    "new, convolutions": lambda: backends.cudnn.conv.fp32_precision,
    "new, products": lambda: backends.cuda.matmul.fp32_precision,
    "new, CPU": lambda: backends.mkldnn.matmul.fp32_precision,
}


def precision():
    """All that a user can read of float32's precision; None where PyTorch refuses to tell."""
    values = dict.fromkeys(READERS)
    for name, read in READERS.items():
        with contextlib.suppress(RuntimeError):
            values[name] = read()
    return values


@pytest.fixture(autouse=True)
def settings_put_back():
    yield
    backends.fp32_precision = "none"  # and so all others
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    backends.mkldnn.fp32_precision = "none"


def tf32_is_off():
    now = precision()
    new_is_off = now["new, convolutions"] == now["new, products"] == "ieee"
    return new_is_off and now["cuDNN"] in (False, None) and now["products"] == "highest"


@pytest.mark.long
@pytest.mark.parametrize("choice", CHOICES)
def test_tf32_is_off_in_every_pass_of_the_architect_and_as_the_user_set_it_outside(choice):
    net, seen = small_net(dtype=torch.float32), []
    optim = sgd(net)

    def look(module, inputs, output):
        seen.append(tf32_is_off())
        output.register_hook(lambda gradient: seen.append(tf32_is_off()))

    net.register_forward_hook(look)
    CHOICES[choice]()
    before = precision()
    trn, val = batch(seed=1, dtype=torch.float32), batch(seed=2, dtype=torch.float32)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, optim)
    assert seen == [True] * 8  # forward and backward passes
    with contextlib.suppress(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert precision() == before


class TF32(TorchDispatchMode):
    """Rounds what convolutions and products read to TF32's 10 bits if a GPU would, as far as it is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        is_lossy = False
        if name.startswith("aten::convolution"):  # those without groups, which cuDNN computes
            is_lossy = args[-2 if "backward" in name else -1] == 1 and backends.cudnn.allow_tf32
        if name in ("aten::mm", "aten::bmm", "aten::addmm"):
            is_lossy = backends.cuda.matmul.allow_tf32
        if is_lossy:
            args = tuple(rounded(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


def rounded(x):
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view_as(x)


def hessian_error(execution):
    """Relative error of eq. 7 in float32, as a GPU would compute it, against float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        net = small_net(C_in=3, C=4, n_nodes=3, dtype=torch.float32, execution=execution).to(dtype)
        trn, val = (batch(n=8, channels=3, seed=seed, dtype=torch.float32) for seed in (1, 2))
        trn, val = ((X.to(dtype), y) for X, y in (trn, val))
        d = torch.autograd.grad(net.loss(*val), list(net.weights()))
        with TF32() if dtype == torch.float32 else contextlib.nullcontext():
            hessian = Architect(net, 0.9, 3e-4).compute_hessian([g.to(dtype) for g in d], *trn)
        results.append(torch.cat([h.flatten().double() for h in hessian]))
    found, exact = results
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.long
@pytest.mark.parametrize("execution", ["plain", "fused"])
def test_tf32_would_spoil_eq_7_and_is_not_used_in_it(execution, monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)
    torch.set_float32_matmul_precision("high")
    assert hessian_error(execution) < 0.02  # rounding by 2^-24, divided by eps
    monkeypatch.setattr(architect, "full_float32", contextlib.nullcontext)
    assert hessian_error(execution) > 0.05
