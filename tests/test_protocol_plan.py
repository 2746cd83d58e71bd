"""What a protocol runs, in which order, with which options, and what it says about them, without runs."""

import json
import sys

import pytest
from test_protocol import PROTOCOL, finish

import protocol
from config import SearchConfig
from experiment.members import Plan
from experiment.protocol_options import read_options
from experiment.results import results_of
from genotypes import resolve
from run.folder import write_json


def plan_of(folder, *words):
    return Plan(read_options(list(map(str, words))), folder)


def plan_with_selections(folder, top1, *words):
    """A plan of random cells whose selection trainings are over, with these accuracies on the held-out images."""
    plan = plan_of(folder, "--random", len(top1), "--searches", 0, *words)
    for member, accuracy in zip(plan.members, top1):
        finish(plan.selection(member), held_out_top1=accuracy, parameters_M=1.0, multiply_adds_M=2.0)
    return plan


def test_the_best_on_held_out_images_is_trained_in_full(tmp_path):
    plan = plan_with_selections(tmp_path, [0.3, 0.7, 0.7], "--final-seeds", 2, "--seed", 5)
    assert plan.best("random").name == "random-2"  # the first of equal ones
    assert [(member.name, seed) for member, seed in plan.finals()] == [("random-2", 6), ("random-2", 7)]
    final = plan.final(*plan.finals()[0])
    assert final.name == "random-2-final-seed-6"
    assert (final.config.hold_out, final.config.epochs) == (0.0, 600)
    assert final.config.genotype == str(resolve("random:7"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cells", "DARTS_V2", "DARTS_V1"], ["random-2", "DARTS_V2", "DARTS_V1"]),
        (["--finals", "all", "--cells", "DARTS_V2"], ["random-1", "random-2", "DARTS_V2"]),
    ],
)
def test_every_published_cell_is_trained_in_full_and_every_member_on_demand(words, expected, tmp_path):
    plan = plan_with_selections(tmp_path, [0.3, 0.7], *words)
    assert [member.name for member, _ in plan.finals()] == expected


def test_options_reach_the_runs(tmp_path):
    words = ("--dataset", "folder", "--data-path", "my images", "--image-size", 48, "--workers", 0, "--device", "cpu")
    search = "--order first --w_lr 0.1 --early-stop --primitives skip_connect,sep_conv_3x3"
    plan = plan_of(tmp_path, *words, "--skip-bad-images", "--search", search, "--augment", "--layers=5", "--seed", 3)
    config = plan.search(plan.members[1]).config
    assert (config.order, config.w_lr, config.early_stop, config.seed) == ("first", 0.1, True, 5)
    assert config.primitives == ["skip_connect", "sep_conv_3x3"]
    random_member = next(member for member in plan.members if member.kind == "random")
    selection, final = plan.selection(random_member).config, plan.final(random_member, 9).config
    assert (selection.epochs, selection.hold_out, selection.layers, selection.seed) == (100, 0.1, 5, 3)
    assert (final.epochs, final.hold_out, final.layers, final.seed) == (600, 0.0, 5, 9)
    for run in (config, selection, final):
        assert (run.dataset, run.data_path, run.image_size, run.workers) == ("folder", "my images", 48, 0)
        assert (run.device, run.skip_bad_images) == ("cpu", True)


def test_the_defaults_are_the_papers(tmp_path):
    plan = plan_of(tmp_path, "--dataset", "cifar10")
    assert [member.kind for member in plan.members] == ["search"] * 4 + ["random"] * 4
    paper = SearchConfig(["--dataset", "cifar10", "--seed", "1", "--name", "search-1", "--runs-path", str(tmp_path)])
    assert plan.search(plan.members[0]).config.as_dict() == paper.as_dict()
    assert plan.selection(plan.members[4]).config.epochs == 100
    assert plan.final(plan.members[4], 1).config.epochs == 600


def test_random_cells_are_of_the_searches_space(tmp_path):
    search = "--nodes 2 --primitives skip_connect,none,sep_conv_3x3,avg_pool_3x3"
    plan = plan_of(tmp_path, "--searches", 1, "--random", 30, "--search", search)
    cells = [resolve(member.genotype) for member in plan.members if member.kind == "random"]
    assert all(len(cell.normal) == len(cell.reduce) == 2 for cell in cells)
    drawn = {op for cell in cells for gene in (cell.normal, cell.reduce) for node in gene for op, _ in node}
    assert drawn == {"skip_connect", "sep_conv_3x3", "avg_pool_3x3"}
    space = {"space": "darts", "nodes": "2", "primitives": "skip_connect,none,sep_conv_3x3,avg_pool_3x3"}
    assert results_of(plan, "0123456789ab")["search_space"] == space
    plan = plan_of(tmp_path, "--searches", 1, "--random", 2)
    assert [member.genotype for member in plan.members[1:]] == [str(resolve("random:1")), str(resolve("random:2"))]


def test_a_run_with_other_options_or_images_in_a_members_place_is_refused(tmp_path):
    plan = plan_with_selections(tmp_path, [0.3, 0.4])
    other = plan_of(tmp_path, "--random", 2, "--searches", 0, "--augment", "--lr 0.5")
    with pytest.raises(ValueError, match=r"started with --lr 0.025, not 0.5"):
        results_of(other, "0123456789ab")
    summary = plan.selection(plan.members[1]).config.folder().summary
    write_json(summary, json.loads(summary.read_text()) | {"training_fingerprint": "89abcdef"})
    with pytest.raises(ValueError, match="random-2-selection has other images than random-1-selection"):
        results_of(plan, "0123456789ab")


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--search", "--dataset cifar10"), "--search: --dataset is given once, to protocol.py itself"),
        (("--search", "--seed 3"), "--search: --seed is set by protocol.py"),
        (("--search", "--early-stop --eigenvalue-images 0"), "--early-stop needs the eigenvalue"),
        (("--searches", 0, "--random", 0), "nothing to run"),
        (("--member", 9), "jobs 1 to 8 are the members, 9 to 10 final trainings"),
        ((*PROTOCOL, "--name", "before", "--select-epochs", 3), "--select-epochs 2, not 3"),
        ((*PROTOCOL, "--name", "before", "--search", "--order first"), "choose another --name"),
    ],
)
def test_mistakes_are_one_line(words, mention, tmp_path, monkeypatch, capsys):
    protocol.open_folder(plan_of(tmp_path / "runs/protocol/before", *PROTOCOL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["protocol.py", *map(str, words)])
    monkeypatch.setattr(protocol, "run_child", None)
    with pytest.raises(SystemExit) as stop:
        protocol.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert mention in error
    assert error.count("\n") == 1
