"""Which GPU is used, and --deterministic, as far as they can be seen without one."""

import os

import pytest
import torch
from conftest import batch, sgd, small_net

from architect import Architect
from config import SearchConfig
from machine.devices import limit_threads, pick_device
from run.run import Run


@pytest.mark.parametrize(("name", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_gpu_that_is_chosen_by_number_becomes_the_current_one(name, current, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device(name) == torch.device(name)
    assert chosen == current


@pytest.fixture
def settings_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def step():
    net = small_net(dtype=torch.float32)
    trn, val = batch(seed=1, dtype=torch.float32), batch(seed=2, dtype=torch.float32)
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, sgd(net))
    return [alpha.grad for alpha in net.alphas()]


def test_deterministic_sets_what_cuda_needs_and_changes_nothing_on_the_cpu(settings_put_back):
    expected = step()
    Run(SearchConfig(["--device", "cpu"]))
    assert not torch.are_deterministic_algorithms_enabled()
    Run(SearchConfig(["--device", "cpu", "--deterministic"]))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # read when a process first uses cuBLAS
    assert all(torch.equal(a, b) for a, b in zip(step(), expected))


@pytest.mark.parametrize(
    ("set_by_user", "batch", "expected"), [(None, (64, 8, 16), 1), (None, (64, 16, 16), 2), ("2", (64, 8, 16), 2)]
)
def test_small_feature_maps_get_one_thread_unless_the_user_says_otherwise(set_by_user, batch, expected, monkeypatch):
    chosen = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    limit_threads(*batch)
    assert chosen[-1] == expected
