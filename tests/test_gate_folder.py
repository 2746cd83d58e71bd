"""A stranger's run folder writes nowhere else, and two commands at once, a full disk or a kill lose no run."""

import os
import pkgutil
import shutil
import subprocess
import sys

import pytest
from comparing import differences, outcome
from conftest import ROOT
from gates import STAGES, command, refused

import search
import visualize
from models.search_cnn import SearchCNN
from run.folder import RunFolder, write_temporary

pytestmark = pytest.mark.usefixtures("short_runs")

ODD_ENTRIES = {
    "a link": lambda path, victim: path.symlink_to(victim),
    "a link to nothing": lambda path, victim: path.symlink_to(victim.with_name("nothing")),
    "a pipe": lambda path, victim: os.mkfifo(path),
    "a hard link": lambda path, victim: os.link(victim, path),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ODD_ENTRIES)
@pytest.mark.parametrize(
    "name",
    ["config.json", "log.txt", "launcher.txt", "lock", "history.json", "plots/x.png", "tb/events.x", "a/b/c.txt"],
)
def test_a_folder_with_anything_but_files_and_folders_is_refused_and_nothing_is_written(
    kind, name, copied, tmp_path, capsys
):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = copied["search"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    ODD_ENTRIES[kind](path, victim)
    before = sorted(os.listdir(copied["search"]))
    for main, words in (
        (search.main, ["--resume", copied["search"]]),
        (visualize.main, [copied["search"], copied["search"]]),
    ):
        refused(capsys, main, words, path.name)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(copied["search"])) == before


@pytest.mark.parametrize("name", ["plots", "tb"])
def test_folders_that_are_links_are_refused(name, copied, tmp_path, capsys):
    shutil.rmtree(copied["search"] / name)
    (tmp_path / "elsewhere").mkdir()
    (copied["search"] / name).symlink_to(tmp_path / "elsewhere")
    refused(capsys, search.main, ["--resume", copied["search"]], name, "a link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "log.txt", "plots", "tb", "lock", "config.json.tmp"])
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_one_line(name, copied, capsys):
    path = copied["search"] / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    (copied["search"] / "previous.pt").unlink()
    refused(capsys, search.main, ["--resume", copied["search"]])


def test_a_temporary_file_is_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "x.json.tmp").symlink_to(victim)
    temporary = write_temporary(tmp_path / "x.json", b"new")
    assert (victim.read_text(), temporary.read_text(), temporary.is_symlink()) == ("mine", "new", False)


def test_a_file_that_goes_away_while_a_folder_is_checked_is_no_fault(copied, monkeypatch):
    """As checkpoint.pt.tmp of a run that is running."""
    lstat = os.lstat

    def gone(path, **options):
        if str(path).endswith(".tmp"):
            raise FileNotFoundError
        return lstat(path, **options)

    (copied["search"] / "checkpoint.pt.tmp").write_bytes(b"")
    monkeypatch.setattr("os.lstat", gone)
    RunFolder(copied["search"]).check()


@pytest.mark.process
def test_a_run_that_is_running_is_not_touched_by_another_command(tmp_path, capsys):
    words = [word.format(tmp_path) for word in STAGES["search"][1]] + ["--epochs", "1000000", "--workers", "1"]
    first = subprocess.Popen([sys.executable, ROOT / "search.py", *words], stdout=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "search/digits")
    while not folder.checkpoint.exists():
        assert first.poll() is None
    for more in (["--overwrite"], ["--auto-resume"], ["--resume", folder]):
        refused(
            capsys,
            search.main,
            more if "--resume" in more else [*words, *more],
            f"in use by 'process {first.pid} on ",
        )
    first.kill()  # whereupon the lock is gone, whatever becomes of the process that loads images
    first.wait()
    folder.lock()
    assert folder.lock_file.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.process
@pytest.mark.parametrize("end", ["finished", "failed"])
def test_a_folder_is_unlocked_when_a_run_leaves_it(end, tmp_path, monkeypatch):
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    if end == "failed":
        monkeypatch.setattr("search.train", None)
        with pytest.raises(TypeError):
            command(search.main, words)
    else:
        assert command(search.main, words) == 0
    code = f"from run.folder import RunFolder; RunFolder({str(tmp_path / 'search/digits')!r}).lock()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def replaceable(finished, tmp_path):
    """The words that overwrite a run, and its folder."""
    shutil.copytree(finished["search"], tmp_path / "search/digits")
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    return [*words, "--seed", "7", "--overwrite"], tmp_path / "search/digits"


@pytest.mark.long
def test_an_overwritten_run_is_kept_if_the_new_one_cannot_be_saved(replaceable, monkeypatch, capsys):
    words, path = replaceable
    before = outcome(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("run.run.save_checkpoint", "run.folder.write_json", "run.run.get_logger", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            refused(capsys, search.main, words, "No space left")
        assert differences(before, outcome(path)) == []
        assert os.listdir(path.parent) == ["digits"]


class Killed(BaseException):
    """The process ends at once: nothing of the program runs any more."""


@pytest.mark.long
@pytest.mark.parametrize("command_after", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    "place",
    [
        "pathlib.Path.mkdir",
        "run.folder.RunFolder.lock",
        "run.folder.write_temporary",
        "run.folder.write_json",
        "run.run.save_checkpoint",
        "run.folder.RunFolder.check_room",
        "run.folder.RunFolder.forget_replaced",
        "os.rmdir",
    ],
)
def test_a_kill_while_a_run_is_replaced_leaves_a_run_that_both_commands_go_on_with(
    command_after, place, replaceable, monkeypatch
):
    words, path = replaceable
    renamed = []

    def set_aside(old, new, rename=os.rename):
        rename(old, new)
        renamed.append(new)

    def killed(*args, **options):
        if renamed:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", set_aside)
        original = pkgutil.resolve_name(place)
        patch.setattr(place, killed)
        with pytest.raises(Killed):
            command(search.main, words)
    assert command(search.main, words if command_after == "--overwrite" else ["--resume", path]) == 0
    assert os.listdir(path.parent) == ["digits"]
    assert (path / "summary.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("what", ["renamed", "deleted", "replaced"])
def test_a_folder_that_goes_away_under_a_run_ends_it(what, tmp_path, monkeypatch, capsys):
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    path, begin_epoch = tmp_path / "search/digits", SearchCNN.begin_epoch

    def take_away(self, epoch, epochs):
        if epoch == 2:
            shutil.move(path, tmp_path / "moved")
            if what == "deleted":
                shutil.rmtree(tmp_path / "moved")
            if what == "replaced":
                path.mkdir()

    monkeypatch.setattr(SearchCNN, "begin_epoch", take_away)
    refused(capsys, search.main, words, str(path), "renamed, deleted or replaced")
    assert not path.exists() or os.listdir(path) == []
    monkeypatch.setattr(SearchCNN, "begin_epoch", begin_epoch)
    if what == "renamed":
        assert command(search.main, ["--resume", tmp_path / "moved"]) == 0
