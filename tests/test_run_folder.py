"""The folder of a run: one process writes to it, it leads nowhere else, and it is replaced as a whole or not at all."""

import os
import shutil
import subprocess
import sys

import pytest
from comparing import differences, outcome
from conftest import ROOT
from short_runs import STAGES, command, refused

import search
from run.folder import RunFolder, read_json

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.process
def test_a_run_that_is_running_is_not_touched_by_another_command(tmp_path, capsys):
    words = [word.format(tmp_path) for word in STAGES["search"][1]] + ["--epochs", "1000000", "--workers", "1"]
    first = subprocess.Popen([sys.executable, ROOT / "search.py", *words], stdout=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "search/digits")
    while not folder.history.exists():
        assert first.poll() is None
    for more in (["--overwrite"], ["--auto-resume"], ["--resume", folder]):
        refused(capsys, search.main, more if "--resume" in more else [*words, *more], "in use by another process")
    first.kill()  # whereupon the lock is gone, whatever becomes of the process that loads images
    first.wait()
    folder.lock()
    folder.unlock()


class Killed(BaseException):
    """The process ends at once: nothing of the program runs any more."""


@pytest.mark.long
@pytest.mark.parametrize("how", ["full disk", "killed"])
@pytest.mark.parametrize("place", ["run.run.save_checkpoint", "os.fsync"])
def test_an_overwritten_run_is_there_until_the_new_one_is_saved(how, place, finished, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(finished["search"], tmp_path / "search/digits")
    words = [*(word.format(tmp_path) for word in STAGES["search"][1]), "--seed", "7", "--overwrite"]
    before = outcome(path)

    def disturbed(*args):
        raise Killed if how == "killed" else OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, disturbed)
        if how == "killed":
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)
            with pytest.raises(Killed):
                command(search.main, words)
        else:
            refused(capsys, search.main, words, "No space left")
            assert os.listdir(path.parent) == ["digits"]
    assert differences(before, outcome(path)) == []
    assert command(search.main, words) == 0
    assert read_json(path / "config.json")["seed"] == 7


def test_a_run_whose_folder_has_a_link_in_it_is_not_continued(copied, tmp_path, capsys):
    (tmp_path / "elsewhere.txt").write_text("as it was")
    (copied["search"] / "log.txt").unlink()
    (copied["search"] / "log.txt").symlink_to(tmp_path / "elsewhere.txt")
    refused(capsys, search.main, ["--resume", copied["search"], "--epochs", "3"], "log.txt is a link")
    assert (tmp_path / "elsewhere.txt").read_text() == "as it was"
