"""Reports of runs: their content, for any search space and any names, and that a browser shows them offline."""

import html
import json
import re
import shlex
import subprocess

import numpy as np
import pytest
import torch
from conftest import BROWSER, BROWSER_FLAGS
from short_runs import command, refused
from torch.utils.tensorboard import SummaryWriter

import visualize
from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from evidence.search_state import changes, genes
from genotypes import Genotype, from_str, parse
from models.choices import PRIMITIVES
from report import figures, pages
from report.recorded_run import read_run
from trained.evaluation import evaluate

KINDS = ("normal", "reduce")


def page_of(folder):
    """The report of a run."""
    assert command(visualize.main, [folder]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def commands_in(page):
    return html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1]).splitlines()


def write_search(folder, candidates, epochs=4, nodes=2):
    """Write the folder of a search as search.py does, with random weights; returns the weights and the genotypes.

    The weights are kind -> for each epoch [node], (sources, candidates).
    """
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    options = SearchConfig(["--primitives", ",".join(candidates), "--nodes", str(nodes), "--epochs", "10"])
    (folder / "config.json").write_text(json.dumps(options.as_dict()))
    writer = SummaryWriter(str(folder / "tb"))
    weights, genotypes, history = {kind: [] for kind in KINDS}, [], []
    for epoch in range(1, epochs + 1):
        numbers = dict.fromkeys(("train/loss", "train/top1", "valid/loss", "valid/top1"), epoch / 10) | {"epoch": epoch}
        for kind in KINDS:
            logits = [torch.randn(i + 2, len(candidates), generator=generator) for i in range(nodes)]
            weights[kind].append([node.softmax(1) for node in logits])
            for node, edges in enumerate(weights[kind][-1]):
                for source, row in enumerate(edges.tolist()):
                    tags = (f"alpha_{kind}/node{node}_from{source}/{op}" for op in candidates)
                    numbers |= dict(zip(tags, row))
        for tag, number in numbers.items():
            writer.add_scalar(tag, number, 10 * epoch)
        found = [parse(weights[kind][-1], 2, candidates) for kind in KINDS]
        genotypes.append(Genotype(found[0], range(2, nodes + 2), found[1], range(2, nodes + 2)))
        history.append({"epoch": epoch, "valid_top1": epoch / 10, "string": str(genotypes[-1])})
        history[-1] |= {"eigenvalue": None, "alphas_learn": True, "truth": None}
        history[-1] |= {"margins": {kind: [0.1, 0.2] for kind in KINDS}}
    writer.close()
    (folder / "history.json").write_text(json.dumps(history))
    return weights, genotypes


@pytest.mark.parametrize(("stage", "config"), [("search", SearchConfig), ("augment", AugmentConfig)])
def test_a_report_is_one_file_with_the_command_that_repeats_the_run(stage, config, copied):
    page = page_of(copied[stage])
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) > 1
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in page
    words = shlex.split(commands_in(page)[0])[2:]
    assert config(words).as_dict() == json.loads((copied[stage] / "config.json").read_text())


def test_a_searchs_report_shows_all_epochs(copied):
    page = page_of(copied["search"])
    history = json.loads((copied["search"] / "history.json").read_text())
    epochs, labels = (json.loads(re.search(f"data-{name}='([^']*)'", page)[1]) for name in ("epochs", "labels"))
    assert len(epochs) == len(history) == 2
    assert labels[-1] == f"epoch 2, top 1 {history[-1]['valid_top1']:.2%}"
    assert page.count('class="cell"') == len({i for pictures in epochs for i in pictures})
    n_changes = len(changes([genes(from_str(epoch["string"])) for epoch in history]))
    assert f"The genotype changed in {n_changes} of 2 epochs" in page
    assert commands_in(page)[1] == f"python augment.py --dataset digits --genotype {copied['search']}"


def test_an_augment_report_shows_what_the_network_does_on_the_test_images(copied):
    evaluation = evaluate(copied["augment"])
    confusion, n = evaluation.confusion(), len(evaluation.images)
    summary = json.loads((copied["augment"] / "summary.json").read_text())
    assert evaluation.top1 == pytest.approx(summary["test_top1"], abs=1e-6)
    assert np.trace(confusion) / n == pytest.approx(evaluation.top1)
    assert confusion.sum(1).tolist() == np.bincount(evaluation.images.labels).tolist()
    assert evaluation.describe() in page_of(copied["augment"])


def test_several_runs_stand_side_by_side_and_other_folders_are_refused(copied, tmp_path, capsys):
    assert command(visualize.main, [*copied.values(), "--output", tmp_path / "both.html"]) == 0
    assert (tmp_path / "both.html").read_text().count('<section class="run">') == 2
    refused(capsys, visualize.main, [copied["search"], tmp_path], "config.json")


SPACES = {
    "one candidate": ["skip_connect"],
    "none first": ["none", "skip_connect", "sep_conv_3x3"],
    "nine": [*PRIMITIVES, "sep_conv_7x7"],
}


@pytest.mark.long
@pytest.mark.parametrize("candidates", SPACES.values(), ids=SPACES)
def test_a_report_shows_any_search_space(candidates, tmp_path):
    weights, genotypes = write_search(tmp_path / "run", candidates)
    run = read_run(tmp_path / "run")
    assert run.genotypes() == genotypes
    for kind in KINDS:
        for node, edges in enumerate(run.edge_weights(kind)):
            for source, values in enumerate(edges):
                expected = [epoch[node][source].tolist() for epoch in weights[kind]]
                np.testing.assert_allclose(values, expected, rtol=1e-6)  # TensorBoard's are float32
    pages.write([tmp_path / "run"], tmp_path / "report.html")


def test_a_run_of_which_no_epoch_is_over_is_refused(tmp_path):
    write_search(tmp_path / "run", ["none", "skip_connect"], epochs=0)
    with pytest.raises(UserError, match="no epoch is over yet"):
        read_run(tmp_path / "run")


def test_class_names_of_any_characters_are_drawn():
    names = ["$_$", r"$\frac$", r"\$x\$", "caf\udce9", "line\nbreak", "x" * 200]
    assert b"<svg" in figures.to_svg(figures.confusion_matrix(np.eye(6), names))


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("stage", ["search", "augment"])
def test_a_browser_shows_a_report_without_errors_and_without_overflow(copied, tmp_path, stage, width):
    measure = "<script>document.title = document.documentElement.scrollWidth - innerWidth</script></body>"
    (tmp_path / "page.html").write_text(page_of(copied[stage]).replace("</body>", measure))
    flags = [*BROWSER_FLAGS, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},1000", "--dump-dom"]
    shown = subprocess.run(
        [BROWSER, *flags, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in shown.stderr
    assert int(re.search(r"<title>(-?\d+)</title>", shown.stdout)[1]) <= 0
    assert stage == "augment" or "<output>epoch 2" in shown.stdout  # the script ran
