"""A run that is killed, stopped or disturbed loses nothing, and no code of a stranger's is run."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from comparing import differences, outcome
from conftest import ROOT, assert_one_line_error, run_script
from short_runs import command, refused

import augment
import search
from config import SearchConfig
from images.loading import Loader, LoadingError
from run.checkpoints import load_checkpoint, save_checkpoint
from run.run import Run

SMALL = ("--layers", 3, "--init-channels", 2, "--batch-size", 256, "--workers", 0, "--checkpoint-minutes", 0)
WORDS = {
    "search": [*SMALL, "--nodes", 1, "--epochs", 3],
    "augment": [*SMALL, "--genotype", "DARTS_V1", "--epochs", 3],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs that nothing happened to: stage -> folder."""
    cwd = tmp_path_factory.mktemp("alone")
    for stage, words in WORDS.items():
        process = run_script(f"{stage}.py", *words, cwd=cwd)
        assert process.returncode == 0, process.stderr
    return {stage: cwd / "runs" / stage / "digits" for stage in WORDS}


def begin(stage, cwd, *words, **settings):
    command = [sys.executable, ROOT / f"{stage}.py", *map(str, [*WORDS[stage], *words])]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, **settings)
    return process, cwd / "runs" / stage / "digits"


def wait_for_step(process, run, step):
    """Until the run's checkpoint is at this step."""
    while process.poll() is None:
        if (run / "checkpoint.pt").exists() and load_checkpoint(run / "checkpoint.pt")["step"] >= step:
            return
        time.sleep(0.01)


@pytest.mark.process
@pytest.mark.parametrize("stage", WORDS)
def test_killed_runs_end_as_those_left_alone(stage, tmp_path):
    process = run_script("benchmarks/kills.py", stage, "--kills", 3, cwd=tmp_path, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "3 kills" in process.stdout


@pytest.mark.process
@pytest.mark.slow
def test_runs_of_three_ranks_of_which_one_is_killed_end_as_those_left_alone(tmp_path):
    process = run_script("benchmarks/kills.py", "search", "--kills", 3, "--ranks", 3, cwd=tmp_path, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "3 kills" in process.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "name"), [("search", "SIGINT"), ("augment", "SIGTERM"), ("search", "SIGUSR1"), ("augment", "SIGHUP")]
)
def test_signals_finish_the_step_and_save(stage, name, alone, tmp_path):
    number = getattr(signal, name)
    process, run = begin(stage, tmp_path)
    wait_for_step(process, run, 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == ""
    assert f"--resume runs/{stage}/digits" in out
    assert 1 <= load_checkpoint(run / "checkpoint.pt")["step"] < load_checkpoint(alone[stage] / "checkpoint.pt")["step"]
    assert run_script(f"{stage}.py", "--resume", run, "--workers", 1, cwd=tmp_path).returncode == 0
    assert differences(outcome(alone[stage]), outcome(run)) == []


@pytest.mark.process
def test_ctrl_c_leaves_the_loading_processes_alone(alone, tmp_path):
    process, run = begin("augment", tmp_path, "--workers", 2, start_new_session=True)
    wait_for_step(process, run, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert err == ""
    assert run_script("augment.py", "--resume", run, cwd=tmp_path).returncode == 0
    assert differences(outcome(alone["augment"]), outcome(run)) == []


@pytest.mark.process
def test_a_second_interrupt_stops_at_once_and_damages_nothing(tmp_path):
    process, run = begin("search", tmp_path, "--checkpoint-minutes", 10)
    wait_for_step(process, run, 0)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert load_checkpoint(run / "checkpoint.pt")["epoch"] == 0


@pytest.fixture
def saved(alone, tmp_path):
    """A copy of a search's folder."""
    shutil.copytree(alone["search"], tmp_path / "run")
    return tmp_path / "run"


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.process
def test_code_in_a_checkpoint_is_refused_and_not_run(saved, tmp_path):
    state = load_checkpoint(saved / "checkpoint.pt") | {"results": RunsCode(tmp_path / "ran")}
    torch.save(state, saved / "checkpoint.pt")
    assert_one_line_error(run_script("search.py", "--resume", saved, cwd=tmp_path), "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def change(content, path, value):
    """Set an entry of nested dicts and lists; value None: delete it."""
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.process
@pytest.mark.parametrize(
    ("path", "value", "mentions"),
    [
        (["stage"], "augment", ["augment"]),
        (["config", "init_channels"], 4, ["--init-channels 4, not 2"]),
        (["classes", "network"], "GumbelCNN", ["network GumbelCNN, not SearchCNN"]),
        (["classes", "architect"], "L1", ["architect L1, not Architect"]),
        (["parts"], {}, ["net"]),
        (["parts", "net", "stem.0.weight"], None, ["stem.0.weight is missing"]),
        (["parts", "net", "of_another"], torch.zeros(1), ["of_another is unknown"]),
        (["parts", "net", "stem.0.weight"], torch.zeros(6, 1, 5, 5), ["stem.0.weight", "[6, 1, 5, 5]"]),
        (["parts", "net", "stem.0.weight"], torch.zeros(6, 1, 3, 3).double(), ["float64"]),
        (["parts", "net", "stem.0.weight"], "x", ["str"]),
        (["parts", "w_optim", "state", 0, "momentum_buffer"], torch.zeros(1), ["momentum_buffer of parameter 0"]),
        (["parts", "w_optim", "state", 10**6], {"momentum_buffer": torch.zeros(1)}, ["IndexError"]),
        (["parts", "alpha_optim", "state", 0, "exp_avg"], torch.zeros(9), ["exp_avg of parameter 0"]),
        (["random"], {}, ["cpu"]),
        (["random", "cpu"], torch.zeros(7, dtype=torch.uint8), ["not as this program writes it"]),
        (["epoch"], "one", ["not as this program writes it"]),
        (["results", "data", "training", "classes", "0"], 99, ["no longer those of the run"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_what_differs(path, value, mentions, saved, monkeypatch, capsys):
    state = load_checkpoint(saved / "checkpoint.pt")
    change(state, path, value)
    save_checkpoint(state, saved)
    refused(capsys, search.main, ["--resume", saved], *mentions)


@pytest.mark.process
def test_damaged_checkpoints_are_one_line(saved, capsys):
    data = (saved / "checkpoint.pt").read_bytes()
    chance = random.Random(0)
    for length in [*range(5), *(chance.randrange(len(data) // 2) for _ in range(5))]:
        (saved / "checkpoint.pt").write_bytes(data[:length])
        refused(capsys, search.main, ["--resume", saved], "checkpoint.pt")


@pytest.mark.process
def test_buffers_are_laid_out_in_memory_as_their_parameters(saved, alone):
    """Fused steps of optimizers rely on it, and files keep the strides that tensors had."""
    state = load_checkpoint(saved / "checkpoint.pt")
    for buffers in state["parts"]["w_optim"]["state"].values():
        buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()
    save_checkpoint(state, saved)
    for run in (saved, alone["search"]):
        shutil.copytree(run, run.with_name(f"{run.name}-longer"))
        process = run_script("search.py", "--resume", f"{run}-longer", "--epochs", 4, cwd=saved.parent)
        assert process.returncode == 0, process.stderr
    assert differences(*(outcome(run.with_name(f"{run.name}-longer")) for run in (alone["search"], saved))) == []


def test_what_is_saved_is_a_copy_of_what_was_handed_over(tmp_path):
    run = Run(SearchConfig(["--runs-path", str(tmp_path), "--device", "cpu"]))
    history = run.start({}, {"history": []})["history"]
    history.append("epoch 1")
    run.end_epoch(True, {"history": history})
    history.append("half of epoch 2")
    run.save()
    assert load_checkpoint(run.folder.checkpoint)["results"] == {"history": ["epoch 1"]}


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "words", "mention"),
    [
        ("search", ["--w-lr", 2e9], "train"),
        ("augment", ["--lr", 2e9, "--batch-size", 1437], "test"),
    ],
)
def test_a_number_that_is_not_finite_ends_the_run_and_the_checkpoint_is_from_before(stage, words, mention, tmp_path):
    process = run_script(f"{stage}.py", *WORDS[stage], *words, cwd=tmp_path)
    assert_one_line_error(process, mention, "learning rate")
    run = tmp_path / "runs" / stage / "digits"
    assert not (run / "best.pt").exists()
    state = load_checkpoint(run / "checkpoint.pt")
    # running variances may be infinite: they are recorded while the loss is found out
    assert all(t.isfinite().all() for name, t in state["parts"]["net"].items() if "running" not in name)


@pytest.mark.process
def test_without_room_a_run_does_not_begin(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "search.py", *map(str, WORDS["search"])],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2),
    )
    assert_one_line_error(process, "cannot write to runs/search/digits")
    assert not (tmp_path / "runs/search/digits").exists()


@pytest.mark.process
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no way here to take a running process's disk away")
@pytest.mark.parametrize("stage", WORDS)
def test_a_disk_that_fills_up_ends_the_run_and_resuming_goes_on(stage, alone, tmp_path):
    process, run = begin(stage, tmp_path)
    wait_for_step(process, run, 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # no file may grow past that
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"{stage}.py: error: " in err.splitlines()[-1]
    load_checkpoint(run / "checkpoint.pt")
    assert list(run.glob("*.tmp")) == []
    resumed = run_script(f"{stage}.py", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(outcome(alone[stage]), outcome(run)) == []


def test_a_file_that_cannot_be_written_leaves_the_ones_that_are_there(tmp_path, monkeypatch):
    save_checkpoint({"step": 1}, tmp_path)
    save_checkpoint({"step": 2}, tmp_path, is_best=True)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint({"step": 3}, tmp_path, is_best=True)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"checkpoint.pt": 2, "best.pt": 2}


def test_out_of_memory_says_what_to_lower(capsys):
    refused(capsys, lambda: torch.empty(10**16), [], "--batch-size", "--recompute")


@pytest.mark.process
def test_the_steps_before_a_failing_loading_process_are_saved(alone, tmp_path, monkeypatch, capsys):
    words, epoch_of = [*WORDS["augment"], "--runs-path", tmp_path], Loader.epoch

    def failing(self, epoch, first=0):
        for i, batch in enumerate(epoch_of(self, epoch, first)):
            if (epoch, i) == (2, 3):
                raise LoadingError("a process that loads images has failed")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", failing)
        refused(capsys, augment.main, [*words, "--checkpoint-minutes", 10], "has failed")
    run = tmp_path / "augment/digits"
    assert load_checkpoint(run / "checkpoint.pt")["steps_of_epoch"] == 3
    assert command(augment.main, ["--resume", run]) == 0
    assert differences(outcome(alone["augment"]), outcome(run)) == []
