"""Crowded machines: what fails around a run is told in one line, and the run can go on."""

import io
import os
import subprocess
import sys

import pytest
import torch
from comparing import differences, outcome
from conftest import ROOT
from gates import STAGES, command, refused

import augment
from command_line.errors import UserError, user_errors_in_one_line
from command_line.output import _Survivor
from images.loading import Images, Loader, LoadingError
from machine import ranks
from run.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("short_runs")


class Pixels(list):
    """A source of images of which one ends the process that loads it."""

    def __getitem__(self, i):
        if self.end is not None and i == 5:
            self.end()
        return torch.zeros(1, 8, 8), 0


def no_memory():
    os.kill(os.getpid(), 9)


def no_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.long
@pytest.mark.parametrize(("end", "remedy"), [(no_memory, "--workers"), (no_shared_memory, "--shm-size")])
def test_a_failing_loading_process_says_what_to_lower(end, remedy):
    pixels = Pixels(range(8))
    pixels.end = end
    loader = Loader(Images(pixels, [0] * 8, lambda x: x, None, 0), range(8), 4, torch.device("cpu"), workers=1)
    with pytest.raises(LoadingError, match=remedy):
        list(loader.epoch(1))


@pytest.mark.long
def test_a_loading_process_that_is_killed_during_a_step_ends_none_in_its_midst():
    pixels = Pixels(range(64))
    pixels.end = None
    loader = Loader(Images(pixels, [0] * 64, lambda x: x, None, 0), range(64), 4, torch.device("cpu"), workers=2)
    batches = loader.epoch(1)
    next(batches)
    for worker in loader.loader._iterator._workers:
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # in the loop, a step would be computed here
    with pytest.raises(LoadingError, match="--workers"):
        list(batches)


@pytest.mark.long
def test_the_steps_before_a_failing_loading_process_are_saved(tmp_path, monkeypatch, capsys):
    words = [word.format(tmp_path) for word in STAGES["augment"][1]]
    assert command(augment.main, [*words, "--name", "alone"]) == 0
    epoch_of = Loader.epoch

    def failing(self, epoch, first=0):
        for i, batch in enumerate(epoch_of(self, epoch, first)):
            if (epoch, i) == (2, 3):
                raise LoadingError("a process that loads images has failed")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", failing)
        refused(capsys, augment.main, words, "has failed")
    run = tmp_path / "augment/digits"
    assert load_checkpoint(run / "checkpoint.pt")["within"]["batches"] == 3
    assert command(augment.main, ["--resume", run]) == 0
    assert differences(outcome(tmp_path / "augment/alone"), outcome(run)) == []


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29999",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": None},
        {"RANK": "x"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "1"},
        {"MASTER_PORT": "x"},
        {"MASTER_PORT": "70000"},
        {"MASTER_ADDR": None},
        {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"},
    ],
)
def test_variables_that_torchrun_did_not_set_are_one_line(changes, monkeypatch):
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", ranks.timedelta(seconds=1))
    with pytest.raises(UserError, match=r"TORCHELASTIC_RUN_ID|no connection"), ranks.group():
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.process
def test_an_interrupt_while_torch_is_imported_leaves_no_traceback():
    code = (  # sets the handler first, since a job in the background ignores interrupts
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import command_line.errors as errors; errors.end_silently_on_interrupt(); os.kill(os.getpid(), signal.SIGINT)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (-2, "")


@pytest.mark.long
@pytest.mark.parametrize("name", ["standard output", "standard error"])
def test_a_stream_that_others_have_closed_is_told_when_output_is_lost_and_not_at_exit(name, capsys):
    stream = io.StringIO()
    survivor = _Survivor(stream, name)
    survivor.write("all of it")
    stream.close()
    survivor.flush()  # as logging does at exit
    assert capsys.readouterr().err == ""
    survivor.write("more")
    assert capsys.readouterr().err.count("cannot be written any more") == (name == "standard output")


def test_a_long_message_is_cut_and_odd_characters_are_escaped(capsys):
    with pytest.raises(SystemExit), user_errors_in_one_line("search.py"):
        raise UserError("x" * 10**7 + "\x1b[2J\ud800 end")
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 2000
    assert line.endswith(r"\x1b[2J\ud800 end")
