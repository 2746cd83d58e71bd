"""A protocol's folder and its results.json may come from a stranger too."""

import contextlib
import json
import random
import shutil

import pytest
from gates import STAGES, command, refused, spoilt

import genotypes
import protocol
import visualize
from command_line.errors import UserError
from experiment.members import Task

pytestmark = pytest.mark.usefixtures("short_runs")


def results(n_members=3):
    """The content of a results.json: a search that is over, and two members that are not."""
    origin = {"seconds": 1.0, "version": "x", "machine": None, "fingerprints": {}}
    search = {"epochs": 1, "valid_top1": 0.5, "verdict": "settled", "eigenvalue": None} | origin
    costs = {"parameters_M": 1.0, "multiply_adds_M": 1.0, "held_out_top1": 0.5}
    final = {"final": [{"seed": 1, "test_top1": 0.5} | origin]}
    over = {"search": search, "skip_connections": {"normal": 1, "reduce": 0}, "selection": origin} | costs | final
    options = {"dataset": "digits", "layers": 1, "init_channels": 2, "select_epochs": 1, "epochs": 1, "hold_out": 0.1}
    members = [
        {"name": "search-1", "kind": "search", "seed": 1, "genotype": str(genotypes.DARTS_V1)} | over,
        {"name": "search-2", "kind": "search", "seed": 2, "genotype": None},
        {"name": "DARTS_V2", "kind": "published", "seed": None, "genotype": str(genotypes.DARTS_V2), "final": []},
    ]
    named = {"format": 2, "label": "a", "like": None, "command": "python protocol.py"}
    named["finals"], named["search_space"] = "best", {"nodes": 4, "primitives": "skip_connect,sep_conv_3x3"}
    return named | {"search_options": {"layers": 1}, "training_options": options, "members": members[:n_members]}


@pytest.mark.long
def test_spoilt_results_of_a_protocol_are_reported_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("report.comparison.cells_section", lambda method: "")  # which takes a second
    path, chance = tmp_path / "results.json", random.Random(0)
    path.write_text(json.dumps(results()))
    assert command(visualize.main, [path]) == 0
    codes = []
    for i in range(200):
        with contextlib.suppress(ValueError):  # an integer of too many digits for json
            path.write_text(json.dumps(spoilt(results(), chance), default=lambda value: 7, skipkeys=True))
        codes.append(command(visualize.main, [path, *["--output", tmp_path / "x.md"] * (i % 4 > 0)]))
    assert set(codes) == {0, 2}
    assert codes.count(2) > 100


@pytest.mark.parametrize("name", ["config.json", "results.json", "report.html"])
def test_a_protocol_writes_through_no_link_in_its_folder(name, tmp_path, capsys):
    folder, victim = tmp_path / "protocol" / "digits", tmp_path / "victim"
    folder.mkdir(parents=True)
    victim.write_text("mine")
    (folder / name).symlink_to(victim)
    refused(capsys, protocol.main, ["--random", "1", "--searches", "0", "--runs-path", tmp_path], name, "a link")
    if name == "report.html":
        (folder / "results.json").write_text(json.dumps(results(n_members=1)))
        refused(capsys, visualize.main, [folder / "results.json"], name, "a link")
    assert victim.read_text() == "mine"


SPOILT_SUMMARIES = [
    {},
    {"seconds": "x"},
    {"epochs": 0},
    {"genotype": None},
    {"valid_top1": 2.0},
    {"eigenvalue": []},
    {"seconds": float("nan")},
]


@pytest.mark.long
@pytest.mark.parametrize("change", SPOILT_SUMMARIES)
def test_a_summary_that_is_not_of_a_protocols_run_is_refused(change, copied, tmp_path):
    task = Task("search", "digits", tuple(word for word in STAGES["search"][1][:-2]), tmp_path, 1)
    path = copied["search"] / "summary.json"
    (tmp_path / "search").rename(tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "search" / "digits")
    path = tmp_path / "search" / "digits" / "summary.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | change if change else {"seconds": 1.0}))
    with pytest.raises(UserError, match="no run's: summary"):
        task.summary()
