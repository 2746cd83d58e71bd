"""Reports of real runs: what they say, that they are whole, and that a browser shows them without a request."""

import functools
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script

from genotypes import DARTS_V1, DARTS_V2, PRIMITIVES
from report import pages as report
from running.evaluation import evaluate

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEARCH = ("--layers", 3, "--init-channels", 2, "--nodes", 2, "--batch-size", 256, "--epochs", 3, "--alpha-lr", 0.1)
AUGMENT = ("--layers", 3, "--init-channels", 4, "--batch-size", 128, "--epochs", 2, "--genotype", "DARTS_V1")


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with a search, an augment run and their reports."""
    cwd = tmp_path_factory.mktemp("report")
    for script, words in (("search.py", SEARCH), ("augment.py", AUGMENT)):
        process = run_script(script, *words, cwd=cwd)
        assert process.returncode == 0, process.stderr
    for run in ("runs/search/digits", "runs/augment/digits"):
        process = run_script("visualize.py", run, cwd=cwd)
        assert process.stdout.strip() == f"{run}/report.html", process.stderr
    return cwd


def test_a_report_is_one_file_that_refers_to_nothing_outside(cwd):
    for stage in ("search", "augment"):
        path = cwd / "runs" / stage / "digits/report.html"
        page = path.read_text()
        assert path.stat().st_size < 5e6
        assert all(found.startswith("data:") for found in re.findall(r'(?:src|href)="([^"]*)"', page))
        assert "url(" not in page
        assert all(tag in page for tag in ("<title>", 'name="viewport"', "alt="))


def test_a_searchs_report_tells_what_the_run_did(cwd):
    page = (cwd / "runs/search/digits/report.html").read_text()
    history = json.loads((cwd / "runs/search/digits/history.json").read_text())
    frames, labels = (
        json.loads(html.unescape(re.search(f'data-{name}="([^"]*)"', page)[1])) for name in ("frames", "labels")
    )
    assert len(frames) == len(history) == 3
    assert labels[-1] == f"epoch 3, top 1 {history[-1]['valid_top1']:.2%}"
    assert page.count('class="cell"') == len({i for frame in frames for i in frame})
    assert "images of 1 x 8 x 8" in page
    assert "multiply-adds" in page
    assert "A forward pass takes" in page
    command = html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]).splitlines()
    assert command[0].startswith("python search.py --layers 3 --init-channels 2 --nodes 2")
    assert command[1] == "python augment.py --dataset digits --genotype runs/search/digits"


def test_the_command_in_a_report_repeats_the_run(cwd, tmp_path):
    page = (cwd / "runs/search/digits/report.html").read_text()
    words = html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]).splitlines()[0].split()[2:]
    assert run_script("search.py", *words, cwd=tmp_path).returncode == 0
    both = [(folder / "runs/search/digits/history.json").read_text() for folder in (cwd, tmp_path)]
    assert both[0] == both[1]


def test_an_augment_report_shows_what_the_network_does_on_the_test_images(cwd):
    page = (cwd / "runs/augment/digits/report.html").read_text()
    found = evaluate(cwd / "runs/augment/digits")
    summary = json.loads((cwd / "runs/augment/digits/summary.json").read_text())
    assert found.top1 == pytest.approx(summary["best_test_top1"], abs=1e-6)
    confusion = found.confusion()
    assert confusion.sum() == len(found.labels) == 360
    assert np.trace(confusion) / 360 == pytest.approx(found.top1)
    assert confusion.sum(1).tolist() == np.bincount(found.labels).tolist()
    assert f"{found.top1:.2%} of 360 test images" in page
    wrong = found.wrong()
    sure = found.probabilities.max(1)[wrong]
    assert len(wrong) == 360 - np.trace(confusion)
    assert (np.diff(sure) <= 0).all()


def test_several_runs_stand_side_by_side(cwd, tmp_path):
    path = tmp_path / "both.html"
    process = run_script("visualize.py", "runs/search/digits", "runs/augment/digits", "--output", path, cwd=cwd)
    assert process.returncode == 0, process.stderr
    assert path.read_text().count('<section class="run">') == 2


def test_margins_are_of_the_chosen_over_the_best_other_but_none():
    weights = torch.full((2, len(PRIMITIVES)), 0.05)
    weights[0, 0], weights[0, 3], weights[0, 7] = 0.3, 0.2, 0.9
    weights[1, 2] = 0.4
    found = report.margins([weights.tolist()], [[("max_pool_3x3", 0), ("skip_connect", 1)]])
    assert found == pytest.approx([0.1, 0.35])
    assert report.skips(DARTS_V1.normal) == 3
    assert report.skips(DARTS_V2.reduce) == 3


def test_changes_are_counted():
    assert "same in all 2 epochs" in report.changes([DARTS_V1, DARTS_V1])
    text = report.changes([DARTS_V1, DARTS_V2, DARTS_V2, DARTS_V1, DARTS_V1])
    assert "changed 2 times in 5 epochs, at epochs 2, 4; " in text
    assert "the same for the last 2" in text


def test_what_is_no_run_is_refused_in_one_line(cwd, tmp_path):
    assert_one_line_error(run_script("visualize.py", cwd / "runs/search/digits", tmp_path, cwd=tmp_path), "config.json")


@pytest.mark.parametrize("stage", ["search", "augment"])
def test_a_run_of_which_no_epoch_is_over_is_refused_in_one_line(cwd, tmp_path, stage):
    words = [ROOT / f"{stage}.py", *{"search": SEARCH, "augment": AUGMENT}[stage], "--epochs", 100]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=tmp_path, stdout=subprocess.DEVNULL)
    run = tmp_path / "runs" / stage / "digits"
    while process.poll() is None and not (run / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert_one_line_error(run_script("visualize.py", run, cwd=tmp_path), "no epoch is over yet")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("stage", ["search", "augment"])
def test_a_browser_shows_a_report_without_errors(cwd, tmp_path, stage, width):
    page = cwd / "runs" / stage / "digits/report.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
             f"--window-size={width},1000", "--enable-logging=stderr", "--virtual-time-budget=3000"]  # fmt: skip
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=120, check=True)
    shown = run([BROWSER, *flags, "--dump-dom", page.as_uri()])
    assert "CONSOLE" not in shown.stderr
    if stage == "search":
        assert "<output>epoch 3" in shown.stdout  # the script ran
