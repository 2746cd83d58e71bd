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
has_new_interface = hasattr(backends.cudnn, "conv")  # torch 2.9 and up


def set_new(*names_and_values):
    def allow():
        for part, precision in names_and_values:
            part().fp32_precision = precision

    return allow


CHOICES = {
    "nothing": lambda: None,
    "cuDNN without TF32": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "cuBLAS with TF32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
if has_new_interface:
    CHOICES |= {
        "new, all": set_new((lambda: backends, "tf32")),
        "new, convolutions only": set_new((lambda: backends.cudnn.conv, "ieee")),
        "new, both": set_new((lambda: backends.cudnn.conv, "tf32"), (lambda: backends.cuda.matmul, "tf32")),
        "new, CPU": set_new((lambda: backends.mkldnn.matmul, "bf16")),
    }


def precision():
    """All that a user can read of float32's precision; None where this torch refuses to tell."""
    readers = {
        "cuDNN": lambda: backends.cudnn.allow_tf32,
        "cuBLAS": lambda: backends.cuda.matmul.allow_tf32,
        "products": torch.get_float32_matmul_precision,
    }
    if has_new_interface:
        for name in ("", "cudnn", "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul"):
            part = backends
            for attribute in filter(None, name.split(".")):
                part = getattr(part, attribute)
            readers[name] = lambda part=part: part.fp32_precision
    values = dict.fromkeys(readers)
    for name, read in readers.items():
        with contextlib.suppress(RuntimeError):
            values[name] = read()
    return values


@pytest.fixture(autouse=True)
def settings_put_back():
    yield
    if has_new_interface:
        backends.fp32_precision = "none"  # and so all others
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    if has_new_interface:
        backends.mkldnn.fp32_precision = "none"


def tf32_is_off():
    now = precision()
    effective = (now["cudnn.conv"], now["cuda.matmul"]) if has_new_interface else ("ieee", "ieee")
    return effective == ("ieee", "ieee") and now["cuDNN"] in (False, None) and now["products"] == "highest"


@pytest.mark.long
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("xi", [0.0, 0.1], ids=["first order", "second order"])
def test_tf32_is_off_inside_every_pass_of_the_architect_and_as_the_user_set_it_outside(choice, xi):
    net, seen = small_net(dtype=torch.float32), []
    optim = sgd(net)

    def look(module, inputs, output):
        seen.append(tf32_is_off())
        output.register_hook(lambda gradient: seen.append(tf32_is_off()))

    net.register_forward_hook(look)
    CHOICES[choice]()
    before = precision()
    trn, val = batch(seed=1, dtype=torch.float32), batch(seed=2, dtype=torch.float32)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, xi, optim)
    assert len(seen) == (8 if xi else 2)  # forward and backward passes
    assert all(seen)
    assert precision() == before


def test_the_precision_comes_back_when_a_pass_fails():
    torch.set_float32_matmul_precision("high")
    before = precision()
    with contextlib.suppress(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert precision() == before


class TF32(TorchDispatchMode):
    """Rounds what convolutions and products read to TF32's 10 bits, where a GPU would: as far as it is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        is_lossy = False
        if name.startswith("aten::convolution"):  # those without groups, which cuDNN does
            is_lossy = args[-2 if "backward" in name else -1] == 1 and backends.cudnn.allow_tf32
        if name in ("aten::mm", "aten::bmm", "aten::addmm"):
            is_lossy = backends.cuda.matmul.allow_tf32
        if is_lossy:
            args = tuple(map(rounded, args))
        return func(*args, **(kwargs or {}))


def rounded(x):
    if not isinstance(x, torch.Tensor):
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view_as(x)


def hessian_error(execution, size):
    """Relative error of eq. 7 in float32, as a GPU would compute it, against float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        net = small_net(C_in=3, C=4, n_nodes=3, dtype=torch.float32, execution=execution).to(dtype)
        trn, val = (batch(n=8, channels=3, size=size, seed=seed, dtype=torch.float32) for seed in (1, 2))
        trn, val = ((X.to(dtype), y) for X, y in (trn, val))
        d = torch.autograd.grad(net.loss(*val), list(net.weights()))
        with TF32() if dtype == torch.float32 else contextlib.nullcontext():
            hessian = Architect(net, 0.9, 3e-4).compute_hessian([g.to(dtype) for g in d], *trn)
        results.append(torch.cat([h.flatten().double() for h in hessian]))
    found, exact = results
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.long
@pytest.mark.parametrize("execution", ["plain", "fused"])
def test_tf32_would_spoil_eq_7_and_has_no_part_in_it(execution, monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)
    torch.set_float32_matmul_precision("high")
    assert hessian_error(execution, 8) < 0.02  # rounding by 2^-24, divided by eps
    monkeypatch.setattr(architect, "full_float32", contextlib.nullcontext)
    assert hessian_error(execution, 8) > 0.05
