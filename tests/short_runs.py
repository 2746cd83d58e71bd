"""Small runs in this process, whose files tests then change."""

import dataclasses
import shutil
from itertools import islice

import pytest

import augment
import search
from command_line.errors import user_errors_in_one_line
from images.data_sets import DATASETS
from run.folder import RunFolder

SMALL = [
    *("--layers", "3", "--init-channels", "2", "--batch-size", "64", "--workers", "0", "--epochs", "2"),
    *("--device", "cpu", "--runs-path", "{}"),
]
STAGES = {
    "search": (search.main, [*SMALL, "--nodes", "2", "--eigenvalue-images", "1"]),
    "augment": (augment.main, [*SMALL, "--genotype", "DARTS_V1", "--aux-weight", "0"]),
}


@pytest.fixture(scope="module")
def short_runs():
    """Runs in this process learn from a part of the digits, and do not measure how fast their cells are."""
    digits = DATASETS["digits"]

    def load(*args, **options):
        source, labels, n_classes = digits.load(*args, **options)
        return list(islice(source, 200)), labels[:200], n_classes

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", dataclasses.replace(digits, load=load))
        patch.setattr("report.search_log.show_cost", lambda *args: None)
        patch.setattr("augment.describe_latency", lambda *args: "no time")
        yield


def command(main, words):
    """Run a script in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *map(str, words)])
        try:
            with user_errors_in_one_line("script"):
                main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def finished(short_runs, tmp_path_factory):
    """stage -> the folder of a finished run."""
    path = str(tmp_path_factory.mktemp("finished"))
    for main, words in STAGES.values():
        assert command(main, [word.format(path) for word in words]) == 0
    return {stage: RunFolder(f"{path}/{stage}/digits").path for stage in STAGES}


@pytest.fixture
def copied(finished, tmp_path):
    """stage -> a copy of the folder, to be spoilt."""
    return {
        stage: shutil.copytree(path, tmp_path / stage, copy_function=shutil.copy) for stage, path in finished.items()
    }


def refused(capsys, main, words, *mentions):
    """Whether a command ends with exit code 2 and one short line, which is returned."""
    capsys.readouterr()
    assert command(main, words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert len(lines[0]) < 2000
    for mention in mentions:
        assert mention in lines[0]
