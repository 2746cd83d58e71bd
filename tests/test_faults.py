"""Nothing is lost and nobody's code run: kills, damaged files, signals, full disks, bad images."""

import errno
import json
import os
import pickle
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
from PIL import Image

import search
from command_line.errors import UserError, user_errors_in_one_line
from config import SearchConfig
from models.search_cnn import SearchCNN
from run.checkpoints import DamagedCheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from run.folder import RunFolder
from run.run import Run
from utils import get_data

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


def begin(stage, cwd, *words):
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{stage}.py", *map(str, [*WORDS[stage], *words])],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
    words = ("--stages", stage, "--runs", 1, "--kills", 3)
    process = run_script("benchmarks/faults.py", *words, cwd=tmp_path, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "1 of 1 runs identical" in process.stdout


@pytest.mark.process
@pytest.mark.parametrize("stage", WORDS)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
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
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_to_the_whole_group_leave_the_loading_processes_alone(name, alone, tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "augment.py", *map(str, WORDS["augment"]), "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = tmp_path / "runs/augment/digits"
    wait_for_step(process, run, 2)
    os.killpg(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name), err
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
    """A copy of a search's folder, its checkpoint and the one before."""
    shutil.copytree(alone["search"], tmp_path / "run")
    return tmp_path / "run"


def damaged_files(data):
    chance = random.Random(0)
    for length in [*range(5), *(chance.randrange(len(data)) for _ in range(100)), len(data) - 1]:
        yield data[:length]
    for _ in range(100):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        yield bytes(changed)
    for n in (2, 10, 100):
        changed = bytearray(data)
        for _ in range(n):
            changed[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        yield bytes(changed)
    for place in range(1, 120):  # the checksum itself, and the archive's directory
        changed = bytearray(data)
        changed[-place] ^= 1
        yield bytes(changed)


@pytest.mark.process
def test_a_damaged_checkpoint_is_known_and_the_one_before_it_is_used(saved):
    folder, before = RunFolder(saved), load_checkpoint(saved / "previous.pt")
    checkpoint, path, warning = find_checkpoint(folder)
    assert checkpoint["epoch"] > before["epoch"]
    assert path == saved / "checkpoint.pt"
    assert warning is None
    for data in damaged_files(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(DamagedCheckpointError):
            load_checkpoint(path)
        checkpoint, used, warning = find_checkpoint(folder)
        assert checkpoint["epoch"] == before["epoch"]
        assert used == saved / "previous.pt"
        assert "checkpoint.pt" in warning
        assert "previous.pt" in warning
    (saved / "previous.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no other"):
        find_checkpoint(folder)


@pytest.mark.process
def test_a_run_whose_last_checkpoint_is_damaged_ends_as_it_did(saved, alone):
    with open(saved / "checkpoint.pt", "r+b") as file:
        file.truncate(1000)
    process = run_script("search.py", "--resume", saved, cwd=saved.parent)
    assert process.returncode == 0
    assert process.stderr.startswith("warning: ")
    assert len(process.stderr.splitlines()) == 1
    assert differences(outcome(alone["search"]), outcome(saved)) == []


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.process
@pytest.mark.parametrize("how", ["torch.save", "sealed", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(how, saved, tmp_path):
    state = load_checkpoint(saved / "checkpoint.pt") | {"results": RunsCode(tmp_path / "ran")}
    path = saved / "checkpoint.pt"
    if how == "sealed":
        save_checkpoint(state, saved)
    elif how == "torch.save":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"format": RunsCode(tmp_path / "ran")}))
    assert_one_line_error(run_script("search.py", "--resume", saved, cwd=tmp_path), "checkpoint.pt", "plain types")
    assert not (tmp_path / "ran").exists()


@pytest.mark.process
def test_checkpoints_that_do_not_fit_are_refused_by_what_differs(saved, monkeypatch, capsys):
    state = load_checkpoint(saved / "checkpoint.pt")
    net_without_stem = {name: part for name, part in state["keeps"]["net"].items() if not name.startswith("stem")}
    for changes, mentions in (
        ({"format": 99}, ["format 99", "2"]),
        ({"stage": "augment"}, ["stage 'augment'"]),
        ({"config": state["config"] | {"init_channels": 4}}, ["init_channels 4"]),
        ({"keeps": {}}, ["too small"]),
        ({"keeps": state["keeps"] | {"net": {}}}, ["too small"]),
        ({"keeps": state["keeps"] | {"net": net_without_stem}}, ["another network", "stem"]),
        ({"random": {}}, ["cpu"]),
        ({"within": {}}, ["within"]),
        ({"config": state["config"] | {"momentum_of_alpha": 0.5}}, ["unrecognized", "momentum-of-alpha"]),
        ({"classes": "SearchCNN"}, ["classes is 'SearchCNN'"]),
        ({"classes": {"network": "GumbelCNN"}}, ["network GumbelCNN, not SearchCNN"]),
        ({"classes": {"network": "SearchCNN", "architect": "L1"}}, ["architect L1, not Architect"]),
    ):
        save_checkpoint(state | changes, saved)
        monkeypatch.setattr("sys.argv", ["search.py", "--resume", str(saved)])
        with pytest.raises(SystemExit) as stop:
            search.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert all(mention in line for mention in mentions)


def without(option, saved):
    """Let a run be as one from before the program had this option."""
    options = json.loads((saved / "config.json").read_text())
    del options[option]
    (saved / "config.json").write_text(json.dumps(options))
    state = load_checkpoint(saved / "checkpoint.pt")
    del state["config"][option]
    save_checkpoint(state, saved)


@pytest.mark.process
@pytest.mark.parametrize(("stage", "option"), [("search", "primitives"), ("search", "amp"), ("augment", "execution")])
def test_a_run_from_before_an_option_goes_on_with_its_default(stage, option, alone, tmp_path):
    shutil.copytree(alone[stage], tmp_path / "run")
    before = json.loads((tmp_path / "run/config.json").read_text())
    without(option, tmp_path / "run")
    process = run_script(f"{stage}.py", "--resume", tmp_path / "run", "--epochs", 4, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run/config.json").read_text()) == before | {"epochs": 4}


@pytest.mark.process
def test_an_option_that_is_not_known_is_one_line(saved):
    options = json.loads((saved / "config.json").read_text()) | {"momentum_of_alpha": 0.5}
    (saved / "config.json").write_text(json.dumps(options))
    process = run_script("search.py", "--resume", saved, cwd=saved.parent)
    assert_one_line_error(process, "config.json", "momentum_of_alpha")


class OtherCNN(SearchCNN):
    """A network of a user's, that searches otherwise."""


@pytest.mark.process
def test_a_search_with_a_users_network_is_not_resumed_as_darts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["search.py", *map(str, WORDS["search"]), "--epochs", "1"])
    search.main(network=OtherCNN)
    run = "runs/search/digits"
    assert_one_line_error(run_script("search.py", "--resume", run, cwd=tmp_path), "network OtherCNN, not SearchCNN")
    monkeypatch.setattr("sys.argv", ["search.py", "--resume", run])
    search.main(network=OtherCNN)


def test_what_is_saved_is_a_copy_of_what_was_handed_over(tmp_path):
    run = Run(SearchConfig(["--runs-path", str(tmp_path), "--device", "cpu"]))
    history = run.start({}, {"history": []})["history"]
    history.append("epoch 1")
    run.end_epoch(True, {"history": history})
    history.append("half of epoch 2")
    run.save()
    run.tensorboard.close()
    assert load_checkpoint(run.folder.checkpoint)["results"] == {"history": ["epoch 1"]}


@pytest.mark.process
def test_a_file_without_a_seal_is_taken_for_no_checkpoint_of_ours(saved):
    torch.save(load_checkpoint(saved / "checkpoint.pt"), saved / "checkpoint.pt")
    with pytest.raises(DamagedCheckpointError, match="checksum is missing"):
        load_checkpoint(saved / "checkpoint.pt")


@pytest.mark.process
def test_a_run_killed_before_it_saved_anything_starts_when_resumed(alone, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(alone["search"] / "config.json", run)
    process = run_script("search.py", "--resume", run, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert differences(outcome(alone["search"]), outcome(run)) == []


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "words", "phase"),
    [
        ("search", ["--w-lr", 2e9], "alpha"),
        ("augment", ["--lr", 2e9], "w"),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run_before_they_spoil_it(stage, words, phase, tmp_path):
    process = run_script(f"{stage}.py", *WORDS[stage], *words, cwd=tmp_path)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    complaint = process.stderr.splitlines()[-1]
    assert all(mention in complaint for mention in (f"phase {phase}", "learning rate", "not both finite"))
    run = tmp_path / "runs" / stage / "digits"
    fault = json.loads((run / "fault.json").read_text())
    state = load_checkpoint(run / "checkpoint.pt")
    assert fault["step"] == state["step"] + 1
    assert fault["phase"] == phase
    assert all(len(samples) > 1 for samples in fault["samples"].values())
    # running variances may be infinite: they are recorded while the loss is found out
    assert all(t.isfinite().all() for name, t in state["keeps"]["net"].items() if "running" not in name)


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
def test_a_disk_that_fills_up_costs_what_was_being_written(stage, alone, tmp_path):
    process, run = begin(stage, tmp_path)
    wait_for_step(process, run, 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # no file may grow past that
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "could not be saved" in err
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
    assert steps == {"checkpoint.pt": 2, "previous.pt": 1, "best.pt": 2}


def test_out_of_memory_says_what_to_lower(capsys):
    with pytest.raises(SystemExit) as stop, user_errors_in_one_line("search.py"):
        torch.empty(10**16)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--batch-size" in line
    assert "--recompute" in line


BAD = {
    "truncated.png": lambda path: path.write_bytes(path.with_name("000.png").read_bytes()[:60]),
    "empty.png": lambda path: path.touch(),
    "text.png": lambda path: path.write_text("no image"),
    "real.tif": lambda path: Image.new("F", (12, 12)).save(path),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named_or_left_out(name, image_folder, tmp_path, capsys):
    folder = image_folder(tmp_path / "images")
    BAD[name](folder / "train" / "left" / name)
    with pytest.raises(UserError, match=f"cannot read the image .*{name}.*--skip-bad-images"):
        get_data("folder", folder, 0, False, image_size=8)
    *_, data = get_data("folder", folder, 0, False, image_size=8, skip_bad_images=True)
    assert len(data) == 24
    assert "1 of 25 images left out" in capsys.readouterr().err


@pytest.mark.process
def test_a_search_leaves_bad_images_out_when_told_to(image_folder, tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "train" / "left" / "000.png").write_bytes(b"")
    words = (
        *WORDS["search"],
        "--epochs",
        1,
        "--batch-size",
        8,
        "--dataset",
        "folder",
        "--data-path",
        folder,
        "--image-size",
        8,
    )
    assert_one_line_error(run_script("search.py", *words, cwd=tmp_path), "cannot read the image", "000.png")
    assert not (tmp_path / "runs").exists()
    process = run_script("search.py", *words, "--skip-bad-images", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "1 of 24 images left out" in process.stderr


def test_a_class_of_bad_images_alone_cannot_be_skipped(image_folder):
    folder = image_folder(splits=("train",))
    for path in (folder / "train" / "left").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of left"):
        get_data("folder", folder, 0, False, skip_bad_images=True)


@pytest.mark.process
def test_paths_with_spaces_and_unicode_work(tmp_path):
    process = run_script("search.py", *WORDS["search"], "--epochs", 1, "--runs-path", "très long/路", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert run_script("search.py", "--resume", "très long/路/search/digits", cwd=tmp_path).returncode == 0
