import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact import smoothed
from short_runs import copied, finished, short_runs  # noqa: F401 -- fixtures
from torch import nn

from machine import ranks
from models.choices import EXECUTIONS
from models.fast import search_cell
from models.search_cnn import SearchCNN

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
)


@pytest.fixture(autouse=True)
def tests_that_start_python_say_so(request, monkeypatch):
    """Fail a test that starts Python without the marker `process`, by which `make check` leaves it out."""
    start = subprocess.Popen.__init__

    def start_another_program(self, args, *more, **options):
        assert str(args[0]) != sys.executable, "mark this test with pytest.mark.process"
        start(self, args, *more, **options)

    if not any(map(request.node.get_closest_marker, ("process", "slow"))):
        monkeypatch.setattr(subprocess.Popen, "__init__", start_another_program)


def run_script(script, *words, cwd, timeout=300):
    """Run a script of this project as a user does; returns the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line_error(process, *mentions):
    """A user's mistake: exit code 2, one line on stderr that mentions these, nothing that looks like a traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert "error: " in lines[0]
    for mention in mentions:
        assert mention in lines[0]


both_executions = pytest.mark.parametrize("execution", EXECUTIONS)


@pytest.fixture(params=["EDGE_BY_EDGE", "BATCHED"])
def layout(request, monkeypatch):
    """The fused execution in the layout of the CPU, and in that of CUDA."""
    monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, request.param))


@pytest.fixture
def log_lines(monkeypatch):
    """What the program's logger says during the test: a list of messages, whatever other tests did to the logger."""
    logger, lines = logging.getLogger("darts"), []

    class Collector(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    monkeypatch.setattr(logger, "handlers", [Collector()])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    return lines


def small_net(smooth=False, dtype=torch.float64, seed=0, kind=SearchCNN, **changes):
    torch.manual_seed(seed)
    arguments = {"C_in": 1, "C": 2, "n_classes": 3, "n_layers": 3, "criterion": nn.CrossEntropyLoss(), "n_nodes": 2}
    net = kind(**arguments | changes).to(dtype)
    return smoothed(net) if smooth else net


def batch(n=6, channels=1, size=8, n_classes=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, channels, size, size, dtype=dtype, generator=generator)
    return X, torch.randint(n_classes, (n,), generator=generator)


class Batches(list):
    """Global batches in a list, in the place of a `Loader`."""

    def epoch(self, epoch, first=0):
        for X, y in self[first:]:
            rows = ranks.rows(len(y))
            yield X[rows], y[rows], len(y)


def sgd(net, lr=0.1, momentum=0.9, weight_decay=3e-4, steps=0):
    """An optimizer of the net's weights that has taken some steps, so that its momentum buffers are there."""
    optim = torch.optim.SGD(net.weights(), lr, momentum=momentum, weight_decay=weight_decay)
    for step in range(steps):
        optim.zero_grad()
        net.loss(*batch(seed=100 + step)).backward(inputs=list(net.weights()))
        optim.step()
    optim.zero_grad()
    return optim


@pytest.fixture
def image_folder(tmp_path):
    """A factory of image folders: two classes that a network can tell apart, bright left and bright right halves."""
    from PIL import Image

    def make(root=tmp_path / "images", splits=("train", "val"), classes=("left", "right"), n=12, size=12, mode="RGB"):
        generator = torch.Generator().manual_seed(0)
        for split in splits:
            for c, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    pixels = torch.randint(0, 100, (size, size), generator=generator)
                    pixels[:, c * size // 2 : (c + 1) * size // 2] += 150
                    Image.fromarray(pixels.byte().numpy()).convert(mode).save(folder / f"{i:03d}.png")
        return root

    return make
