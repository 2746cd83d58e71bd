"""A run that is killed, stopped or disturbed loses nothing, and no code of a stranger's is run."""

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
from conftest import ROOT, run_script
from short_runs import command, refused

import augment
import search
from images.loading import Loader, LoadingError
from run.checkpoints import load_checkpoint, save_checkpoint

SMALL = ("--layers", 3, "--init-channels", 2, "--batch-size", 256, "--workers", 0, "--checkpoint-minutes", 0)
WORDS = {
    "search": [*SMALL, "--nodes", 1, "--epochs", 3],
    "augment": [*SMALL, "--genotype", "DARTS_V1", "--epochs", 3],
}


MAINS = {"search": search.main, "augment": augment.main}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs that nothing happened to: stage -> folder."""
    cwd = tmp_path_factory.mktemp("alone")
    for stage, words in WORDS.items():
        assert command(MAINS[stage], [*words, "--runs-path", cwd]) == 0
    return {stage: cwd / stage / "digits" for stage in WORDS}


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
    ("stage", "number", "workers"),
    [
        ("search", signal.SIGINT, 0),
        ("augment", signal.SIGTERM, 0),
        ("search", signal.SIGUSR1, 0),
        ("augment", signal.SIGINT, 2),
    ],
)
def test_signals_finish_the_step_and_save(stage, number, workers, alone, tmp_path):
    process, run = begin(stage, tmp_path, "--workers", workers, start_new_session=True)
    wait_for_step(process, run, 1)
    (os.killpg if workers else os.kill)(process.pid, number)  # Ctrl-C reaches the processes that load images too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == ""
    assert f"--resume runs/{stage}/digits" in out
    assert 1 <= load_checkpoint(run / "checkpoint.pt")["step"] < load_checkpoint(alone[stage] / "checkpoint.pt")["step"]
    assert command(MAINS[stage], ["--resume", run, "--workers", 1]) == 0
    assert differences(outcome(alone[stage]), outcome(run)) == []


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


@pytest.mark.long
def test_code_in_a_checkpoint_is_refused_and_not_run(saved, tmp_path, capsys):
    state = load_checkpoint(saved / "checkpoint.pt") | {"results": RunsCode(tmp_path / "ran")}
    torch.save(state, saved / "checkpoint.pt")
    refused(capsys, search.main, ["--resume", saved], "checkpoint.pt")
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "value", "mentions"),
    [
        (["stage"], "augment", ["augment"]),
        (["config", "init_channels"], 4, ["--init-channels 4, not 2"]),
        (["classes", "network"], "GumbelCNN", ["network GumbelCNN, not SearchCNN"]),
        (["parts"], {}, ["net"]),
        (["parts", "net", "stem.0.weight"], None, ["stem.0.weight is missing"]),
        (["parts", "net", "stem.0.weight"], torch.zeros(6, 1, 5, 5), ["stem.0.weight", "[6, 1, 5, 5]"]),
        (["parts", "net", "stem.0.weight"], torch.zeros(6, 1, 3, 3).double(), ["float64"]),
        (["parts", "w_optim", "state", 0, "momentum_buffer"], torch.zeros(1), ["momentum_buffer of parameter 0"]),
        (["epoch"], "one", ["not as this program writes it"]),
        (["results", "data", "training", "classes", "0"], 99, ["no longer those of the run"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_what_differs(path, value, mentions, saved, monkeypatch, capsys):
    state = load_checkpoint(saved / "checkpoint.pt")
    change(state, path, value)
    save_checkpoint(state, saved)
    refused(capsys, search.main, ["--resume", saved], *mentions)


@pytest.mark.long
def test_damaged_checkpoints_are_one_line(saved, capsys):
    data = (saved / "checkpoint.pt").read_bytes()
    chance = random.Random(0)
    for length in [*range(5), *(chance.randrange(len(data) // 2) for _ in range(5))]:
        (saved / "checkpoint.pt").write_bytes(data[:length])
        refused(capsys, search.main, ["--resume", saved], "checkpoint.pt")


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "words"), [("search", ["--w-lr", 2e9]), ("augment", ["--lr", 2e9, "--batch-size", 1437])]
)
def test_a_number_that_is_not_finite_ends_the_run_and_the_checkpoint_is_from_before(stage, words, tmp_path, capsys):
    refused(capsys, MAINS[stage], [*WORDS[stage], *words, "--runs-path", tmp_path], "learning rate")
    run = tmp_path / stage / "digits"
    assert not (run / "best.pt").exists()
    state = load_checkpoint(run / "checkpoint.pt")
    # running variances may be infinite: they are recorded while the loss is found out
    assert all(t.isfinite().all() for name, t in state["parts"]["net"].items() if "running" not in name)


@pytest.mark.long
def test_auto_resume_starts_goes_on_and_refuses_other_options(tmp_path, capsys):
    words = [*WORDS["search"], "--runs-path", tmp_path, "--auto-resume", "--epochs"]
    assert command(search.main, [*words, 1]) == command(search.main, [*words, 1]) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out
    assert command(search.main, [*words, 2]) == 0
    assert load_checkpoint(tmp_path / "search/digits/checkpoint.pt")["epoch"] == 2
    refused(capsys, search.main, [*words, 2, "--seed", 3], "seed")


@pytest.mark.process
def test_without_room_a_run_does_not_begin(tmp_path):
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2)}
    process, run = begin("search", tmp_path, **limited)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "cannot write to runs/search/digits" in err
    assert not run.exists()


@pytest.mark.process
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no way here to take a running process's disk away")
def test_a_disk_that_fills_up_ends_the_run_and_resuming_goes_on(alone, tmp_path):
    process, run = begin("search", tmp_path)
    wait_for_step(process, run, 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # no file may grow past that
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "search.py: error: " in err
    assert list(run.glob("*.tmp")) == []
    assert command(search.main, ["--resume", run]) == 0
    assert differences(outcome(alone["search"]), outcome(run)) == []


def test_out_of_memory_says_what_to_lower(capsys):
    refused(capsys, lambda: torch.empty(10**16), [], "--batch-size", "--recompute")


@pytest.mark.long
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
