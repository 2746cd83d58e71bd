"""Reports of runs: their content, for any search space and any names, and that a browser shows them offline."""

import functools
import html
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BROWSER, BROWSER_FLAGS, assert_one_line_error, run_script
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from evidence import search_state
from genotypes import Genotype, from_str, parse
from models.choices import PRIMITIVES
from report import figures, pages
from report.recorded_run import KINDS, read_run
from trained.evaluation import Evaluation, evaluate

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


def write_search(folder, candidates, epochs=4, nodes=2, skipped_tag=None):
    """Write the folder of a search as search.py does, with random weights; returns the weights and the genotypes.

    The weights are kind -> for each epoch [node], (sources, candidates). skipped_tag: left out in the last epoch.
    """
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    options = SearchConfig(["--primitives", ",".join(candidates), "--nodes", str(nodes), "--epochs", "10"])
    (folder / "config.json").write_text(json.dumps(options.as_dict()))
    writer = SummaryWriter(str(folder / "tb"))
    weights = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for _ in range(epochs):
            logits = [torch.randn(i + 2, len(candidates), generator=generator) for i in range(nodes)]
            weights[kind].append([node.softmax(1) for node in logits])
    history, genotypes = [], []
    for epoch in range(1, epochs + 1):
        step = 10 * epoch
        for tag in ("train/loss", "train/top1", "valid/loss", "valid/top1"):
            writer.add_scalar(tag, epoch / 10, step)
        writer.add_scalar("epoch", epoch, step)
        for kind in KINDS:
            for node, edges in enumerate(weights[kind][epoch - 1]):
                for source, row in enumerate(edges.tolist()):
                    for op, weight in zip(candidates, row):
                        tag = f"alpha_{kind}/node{node}_from{source}/{op}"
                        if (tag, epoch) != (skipped_tag, epochs):
                            writer.add_scalar(tag, weight, step)
        genes = {kind: parse(weights[kind][epoch - 1], 2, candidates) for kind in KINDS}
        concat = range(2, nodes + 2)
        genotypes.append(Genotype(genes["normal"], concat, genes["reduce"], concat))
        history.append({"epoch": epoch, "valid_top1": epoch / 10, "string": str(genotypes[-1])})
        history[-1] |= {"eigenvalue": None, "margins": {kind: [0.1, 0.2] for kind in KINDS}}
    writer.close()
    (folder / "history.json").write_text(json.dumps(history))
    return weights, genotypes


@pytest.mark.process
def test_a_report_is_one_file_that_refers_to_nothing_outside(cwd):
    for stage in ("search", "augment"):
        path = cwd / "runs" / stage / "digits/report.html"
        page = path.read_text()
        assert path.stat().st_size < 5e6
        links = re.findall(r'(?:src|href)="([^"]*)"', page)
        assert len(links) > 1
        assert all(link.startswith("data:") for link in links)
        assert "url(" not in page
        assert all(tag in page for tag in ("<title>", 'name="viewport"', "alt="))


@pytest.mark.process
def test_a_searchs_report_tells_what_the_run_did(cwd):
    page = (cwd / "runs/search/digits/report.html").read_text()
    history = json.loads((cwd / "runs/search/digits/history.json").read_text())
    epochs, labels = (json.loads(re.search(f"data-{name}='([^']*)'", page)[1]) for name in ("epochs", "labels"))
    assert len(epochs) == len(history) == 3
    assert labels[-1] == f"epoch 3, top 1 {history[-1]['valid_top1']:.2%}"
    assert page.count('class="cell"') == len({i for pictures in epochs for i in pictures})
    cells = [search_state.cell(from_str(epoch["string"])) for epoch in history]
    assert f"The genotype changed in {len(search_state.changes(cells))} of 3 epochs" in page
    command = html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]).splitlines()
    assert command[0].startswith("python search.py --layers 3 --init-channels 2 --nodes 2")
    assert command[1] == "python augment.py --dataset digits --genotype runs/search/digits"


@pytest.mark.process
@pytest.mark.parametrize(("stage", "config"), [("search", SearchConfig), ("augment", AugmentConfig)])
def test_the_command_in_a_report_has_the_options_of_the_run(cwd, stage, config):
    page = (cwd / "runs" / stage / "digits/report.html").read_text()
    words = shlex.split(html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]).splitlines()[0])[2:]
    assert config(words).as_dict() == json.loads((cwd / "runs" / stage / "digits/config.json").read_text())


@pytest.mark.process
def test_an_augment_report_shows_what_the_network_does_on_the_test_images(cwd):
    page = (cwd / "runs/augment/digits/report.html").read_text()
    evaluation = evaluate(cwd / "runs/augment/digits")
    summary = json.loads((cwd / "runs/augment/digits/summary.json").read_text())
    assert evaluation.top1 == pytest.approx(summary["best_test_top1"], abs=1e-6)
    confusion = evaluation.confusion()
    assert np.trace(confusion) / 360 == pytest.approx(evaluation.top1)
    assert confusion.sum(1).tolist() == np.bincount(evaluation.images.labels).tolist()
    assert f"{evaluation.top1:.2%} of 360 test images" in page
    wrong = evaluation.wrong()
    assert len(wrong) == 360 - np.trace(confusion)
    assert (np.diff(evaluation.probabilities.max(1)[wrong]) <= 0).all()


@pytest.mark.process
def test_several_runs_stand_side_by_side(cwd, tmp_path):
    path = tmp_path / "both.html"
    process = run_script("visualize.py", "runs/search/digits", "runs/augment/digits", "--output", path, cwd=cwd)
    assert process.returncode == 0, process.stderr
    assert path.read_text().count('<section class="run">') == 2


SPACES = {
    "one candidate": ["skip_connect"],
    "three, none first": ["none", "skip_connect", "sep_conv_3x3"],
    "two, without none": ["skip_connect", "sep_conv_3x3"],
    "nine": [*PRIMITIVES, "sep_conv_7x7"],
}


@pytest.mark.long
@pytest.mark.parametrize("candidates", SPACES.values(), ids=SPACES)
def test_a_report_shows_any_search_space(candidates, tmp_path):
    weights, genotypes = write_search(tmp_path / "run", candidates)
    run = read_run(tmp_path / "run")
    assert run.candidates == candidates
    assert run.genotypes() == genotypes
    for kind in KINDS:
        for node, edges in enumerate(run.edge_weights(kind)):
            for source, values in enumerate(edges):
                expected = [epoch[node][source].tolist() for epoch in weights[kind]]
                np.testing.assert_allclose(values, expected, rtol=1e-6)  # TensorBoard's are float32
    pages.write([tmp_path / "run"], tmp_path / "report.html")
    assert f"--primitives {','.join(candidates)}" in html.unescape((tmp_path / "report.html").read_text())


def test_values_that_tensorboards_files_lack_are_gaps_in_the_right_epoch(tmp_path):
    tag = "alpha_normal/node0_from1/skip_connect"
    write_search(tmp_path / "run", ["none", "skip_connect"], epochs=3, skipped_tag=tag)
    run = read_run(tmp_path / "run")
    assert np.isnan(run.by_epoch(tag)).tolist() == [False, False, True]
    assert np.isnan(run.by_epoch("no such tag")).tolist() == [True] * 3
    pages.write([tmp_path / "run"], tmp_path / "report.html")


@pytest.mark.parametrize("n", [2, 3, 8, 20, 29])
def test_every_candidate_has_a_line_of_its_own_and_none_is_grey(n):
    names = [*(f"op_{i}" for i in range(n - 1)), "none"]
    styles = figures.line_styles(names)
    assert list(styles) == names
    assert len(set(map(str, styles.values()))) == n
    assert styles["none"]["color"] == figures.GREY
    assert all(style["color"] != figures.GREY for name, style in styles.items() if name != "none")
    weights = [[np.full((3, n), 1 / n) for _ in range(i + 2)] for i in range(2)]
    legend = figures.edge_weights(weights, names).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == names


def test_an_operation_has_the_same_style_in_every_search_space():
    styles = [figures.line_styles(names)["skip_connect"] for names in SPACES.values()]
    assert styles == [styles[0]] * len(SPACES)


def test_titles_name_the_strongest_candidate_but_none():
    values = np.array([[0.1, 0.6, 0.3], [0.7, 0.1, 0.2]])  # the last epoch counts
    figure = figures.edge_weights([[values, values]], ["none", "skip_connect", "sep_conv_3x3"])
    assert [axes.get_title() for axes in figure.axes] == ["c_{k-2}: sep_conv_3x3", "c_{k-1}: sep_conv_3x3"]


@pytest.mark.parametrize(("script", "message"), [("exit 1", "graphviz's `dot` failed"), (None, "install graphviz")])
def test_where_dot_is_missing_or_fails_the_report_has_the_cells_in_words(tmp_path, monkeypatch, script, message):
    _, genotypes = write_search(tmp_path / "run", ["none", "skip_connect"])
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if script:
        (tmp_path / "bin/dot").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/dot").chmod(0o755)
    pages.write([tmp_path / "run"], tmp_path / "report.html")
    page = html.unescape((tmp_path / "report.html").read_text())
    assert message in page
    assert f"<code>{genotypes[-1].normal}</code>" in page


NAMES = ["$_$", r"$\frac$", r"\$x\$", "caf\udce9", "line\nbreak", "x" * 200, "<b>&"]


def test_class_names_of_any_characters_are_shown_as_they_are():
    n = len(NAMES)
    labels, probabilities = list(range(n)), np.roll(np.eye(n), 1, axis=1)  # each image mistaken for the next class
    images = SimpleNamespace(labels=labels, source=[(Image.new("L", (8, 8)), label) for label in labels])
    evaluation = Evaluation(SimpleNamespace(results={"classes": NAMES}), images, "test", probabilities)
    figure = figures.confusion_matrix(evaluation.confusion(), NAMES)
    figures.to_svg(figure)
    texts = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert texts[:5] == [r"\$_\$", r"\$\frac\$", r"\\$x\\$", r"caf\udce9", r"line\nbreak"]  # as matplotlib escapes `$`
    assert len(texts[5]) < 30
    assert b"<svg" in figures.to_svg(figures.mistakes(evaluation))


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_class_folders_that_are_not_utf8_are_reported(tmp_path, image_folder):
    root = image_folder(size=8, classes=("$_$", r"$\frac$"))
    for split in ("train", "val"):
        os.rename(root / split / r"$\frac$", os.fsencode(root / split) + b"/caf\xe9")
    words = ("--dataset", "folder", "--data-path", root, "--image-size", 8, "--layers", 3, "--init-channels", 2)
    process = run_script(
        "augment.py", *words, "--genotype", "DARTS_V1", "--epochs", 1, "--workers", 0, "--batch-size", 8, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    process = run_script("visualize.py", "runs/augment/folder", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "runs/augment/folder/report.html").read_text(encoding="utf-8")
    assert "<th>$_$</th>" in page
    assert r"<th>caf\xe9</th>" in page


@pytest.mark.process
def test_other_folders_are_refused_in_one_line(cwd, tmp_path):
    assert_one_line_error(run_script("visualize.py", cwd / "runs/search/digits", tmp_path, cwd=tmp_path), "config.json")


def test_a_run_of_which_no_epoch_is_over_is_refused(tmp_path):
    write_search(tmp_path / "run", ["none", "skip_connect"], epochs=0)
    with pytest.raises(UserError, match="no epoch is over yet"):
        read_run(tmp_path / "run")


@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("stage", ["search", "augment"])
def test_a_browser_shows_a_report_without_errors(cwd, tmp_path, stage, width):
    page = cwd / "runs" / stage / "digits/report.html"
    flags = [*BROWSER_FLAGS, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},1000"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=120, check=True)
    shown = run([BROWSER, *flags, "--dump-dom", page.as_uri()])
    assert "CONSOLE" not in shown.stderr
    if stage == "search":
        assert "<output>epoch 3" in shown.stdout  # the script ran
