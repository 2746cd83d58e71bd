"""The passes of eq. 6 and 7 run in full float32, whatever the user has allowed, and leave that as it was."""

import contextlib

import pytest
import torch
from conftest import batch, sgd, small_net

from architect import Architect
from machine.precision import full_float32

backends = torch.backends
if not hasattr(backends.cudnn, "conv"):
    pytest.skip("torch 2.9 has the settings that are read here", allow_module_level=True)


CHOICES = {
    "nothing": lambda: None,
    "cuBLAS with TF32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "new, all": lambda: setattr(backends, "fp32_precision", "tf32"),
    "new, convolutions only": lambda: setattr(backends.cudnn.conv, "fp32_precision", "tf32"),
    "new, CPU": lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
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
