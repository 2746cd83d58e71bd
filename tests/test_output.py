"""Where standard output and error go changes nothing but what is seen there."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

pytestmark = pytest.mark.process

TINY = "--epochs 1 --batch-size 360 --layers 3 --init-channels 2 --workers 0 --print-freq 1"
SEARCH = f"search.py --nodes 1 {TINY}"


def shell(command, cwd, **environment):
    """Run a command line by a shell, `python` being this one; returns the finished process, output as bytes."""
    line = command.replace("python ", f"{sys.executable} {ROOT}/", 1)
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=os.environ | environment, capture_output=True, check=False)


def assert_done(cwd, stage="search"):
    """The run is complete, and its log has all lines."""
    (run,) = (cwd / "runs" / stage).iterdir()
    assert (run / "best.pt").exists()
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    assert summary["epochs"] == 1
    assert any("summary stage=" in line for line in lines)
    return lines


@pytest.mark.parametrize(
    ("redirection", "stderr"),
    [
        ("| head -n 1 >&2", None),
        ("> /dev/full", b"warning: standard output cannot be written any more"),
        (">&-", b""),
        ("2>&-", b""),
        (">&- 2>&- <&-", b""),
        ("2> /dev/full", b""),
    ],
)
def test_a_run_is_done_wherever_its_output_goes(redirection, stderr, tmp_path):
    done = shell(f"set -o pipefail; python {SEARCH} {redirection}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_done(tmp_path)
    assert b"Logging error" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if stderr is not None:
        assert done.stderr.startswith(stderr)
        assert done.stderr.count(b"\n") == stderr.count(b"w") // max(stderr.count(b"w"), 1)


def test_log_lines_do_not_move_to_standard_error_when_output_is_closed(tmp_path):
    done = shell(f"python {SEARCH} >&-", tmp_path)
    assert done.stderr == b""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_the_terminal_lacks_are_escapes_there_and_letters_in_the_log(encoding, image_folder, tmp_path):
    root = image_folder(tmp_path / "数据", classes=("猫", "$_$"))
    words = f"--dataset folder --data-path {root} --image-size 8 --nodes 1 {TINY.replace('360', '6')}"
    done = shell(f"python search.py {words}", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert b"\\u6570\\u636e" in done.stdout
    assert b"python augment.py" in done.stdout
    assert any("猫" in line for line in assert_done(tmp_path))
    refused = shell(
        "python search.py --name other --dataset folder --data-path 数据/猫", tmp_path, PYTHONIOENCODING=encoding
    )
    assert refused.returncode == 2
    assert refused.stderr.count(b"\n") == 1
    assert b"\\u732b" in refused.stderr


@pytest.mark.parametrize("stage", ["search", "augment"])
def test_a_mean_loss_that_is_not_finite_ends_the_run_and_is_not_the_best(stage, tmp_path):
    """One step an epoch, so large that the next forward pass overflows; the step's own numbers are finite."""
    words = ["--epochs", "3", "--batch-size", "720", "--layers", "3", "--init-channels", "2", "--workers", "0"]
    words += ["--nodes", "1", "--w-lr", "2e9"] if stage == "search" else ["--genotype", "DARTS_V2", "--lr", "2e9"]
    if stage == "augment":
        words[words.index("720")] = "1437"
    done = run_script(f"{stage}.py", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-2000:]
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"phase {'valid' if stage == 'search' else 'test'}: the mean loss, " in done.stderr
    assert not (tmp_path / "runs" / stage / "digits" / "best.pt").exists()
