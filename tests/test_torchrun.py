"""The scripts under torchrun: several processes are one run."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import search
from models.search_cnn import SearchCNN
from run.checkpoints import load_checkpoint

TINY = ("--layers", 3, "--init-channels", 2, "--nodes", 2, "--batch-size", 128, "--workers", 0)
TINY_AUGMENT = (*TINY[:4], *TINY[6:], "--genotype", "DARTS_V2")


def torchrun(cwd, n, script, *words, wait=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, ROOT / script]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    command = list(map(str, [*command, *words]))
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)
    if not wait:
        return process
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def values(run, tag):
    return [event.value for event in EventAccumulator(str(run / "tb")).Reload().Scalars(tag)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same search on one rank and on two, with global statistics: the folder that it was started in."""
    cwd = tmp_path_factory.mktemp("torchrun")
    assert run_script("search.py", *TINY, "--epochs", 2, "--name", "one", "--sync-bn", cwd=cwd).returncode == 0
    process = torchrun(cwd, 2, "search.py", *TINY, "--epochs", 2, "--name", "two", "--sync-bn", "--workers", 1)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("summary stage=search") == 1  # one rank writes
    return cwd


@pytest.mark.process
def test_a_search_under_torchrun_goes_as_in_one_process(runs):
    """As far as float32 goes: eq. 7 amplifies rounding. Above it is float64, to 1e-9."""
    for tag in ("step/loss", "step/alpha_loss"):
        one, two = (values(runs / "runs/search" / name, tag) for name in ("one", "two"))
        assert len(one) == 12
        assert one[:3] == pytest.approx(two[:3], rel=1e-4)
        assert one == pytest.approx(two, rel=0.05)
    states = [load_checkpoint(runs / "runs/search" / name / "checkpoint.pt") for name in ("one", "two")]
    for name, tensor in states[0]["parts"]["net"].items():
        if not name.endswith("running_mean"):  # of what is zero but for rounding
            assert torch.allclose(states[1]["parts"]["net"][name].double(), tensor.double(), rtol=1e-2, atol=1e-3), name
    assert [(state["step"], state["epoch"]) for state in states] == [(12, 2)] * 2


@pytest.mark.process
def test_a_run_may_be_resumed_on_another_number_of_ranks(runs):
    run = runs / "runs/search/two"
    process = torchrun(runs, 3, "search.py", "--resume", run, "--epochs", 3)
    assert process.returncode == 0, process.stderr
    assert [epoch["epoch"] for epoch in json.loads((run / "history.json").read_text())] == [1, 2, 3]


@pytest.mark.process
def test_augment_under_torchrun_trains_as_one_process(tmp_path):
    words = ("augment.py", *TINY_AUGMENT, "--epochs", 1, "--sync-bn")
    assert run_script(*words, cwd=tmp_path).returncode == 0
    process = torchrun(tmp_path, 2, *words, "--name", "two")
    assert process.returncode == 0, process.stderr
    losses = [values(tmp_path / "runs/augment" / name, "step/loss") for name in ("digits", "two")]
    assert len(losses[0]) == 12
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-4)  # later, roundings have been amplified
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def children(process):
    """The processes that a process has started, by their numbers."""
    command = ["pgrep", "-P", str(process.pid)]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()))


@pytest.mark.process
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    process = torchrun(tmp_path, 2, "search.py", *TINY, "--epochs", 50, wait=False)
    run = tmp_path / "runs/search/digits"
    while not (run / "genotype.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(children(process)[-1], signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stdout.count("SIGUSR1: stopped after step") == 1
    assert "Traceback" not in stderr.split("torch/distributed/elastic")[0]
    step = load_checkpoint(run / "checkpoint.pt")["step"]
    assert f"stopped after step {step}, saved" in stdout


@pytest.mark.process
def test_a_mistake_is_told_once_and_leaves_nothing(tmp_path):
    process = torchrun(tmp_path, 2, "search.py", "--dataset", "folder", "--data-path", tmp_path)
    assert process.returncode != 0
    assert process.stderr.count("search.py: error: ") == 1
    assert "Traceback" not in process.stderr.split("torch/distributed/elastic")[0]
    assert not (tmp_path / "runs").exists()
    process = torchrun(tmp_path, 2, "augment.py", "--evaluate", tmp_path)
    assert process.stderr.count("--evaluate takes one process") == 1


@pytest.mark.process
def test_gpus_that_are_not_there_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs the script sees none
    assert_one_line_error(run_script("search.py", "--gpus=0,1", cwd=tmp_path), "gpus")


@pytest.mark.parametrize(
    ("module", "program"), [(None, ["my_search.py"]), ("examples.sigmoid", ["-m", "examples.sigmoid"])]
)
def test_gpus_runs_the_command_again_by_torchrun(module, program, monkeypatch):
    started = []
    main = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words) or sys.exit(0))
    monkeypatch.setattr("sys.argv", ["my_search.py", "--gpus", "1", "--epochs", "2"])
    with pytest.raises(SystemExit):
        search.main(network=SearchCNN)
    ((_, *words),) = started
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=1" in words
    assert words[-4 - len(program) :] == [*program, "--gpus", "1", "--epochs", "2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
