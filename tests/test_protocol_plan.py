"""What a protocol runs, in which order, by which options, and what it says of them, without runs."""

import sys
from types import SimpleNamespace

import pytest
from test_protocol import PROTOCOL, finish

import protocol
from config import AugmentConfig, SearchConfig
from experiment.members import Plan, results_of
from experiment.protocol_options import build_parser, read_options
from genotypes import DARTS_V2, resolve
from run.folder import write_json


def options_of(*words):
    return read_options(list(map(str, words)))


def made_up_plan(tmp_path, top1, *words):
    """A plan whose selection trainings are over, with these accuracies on the held-out images."""
    plan = Plan(options_of("--random", len(top1), "--searches", 0, *words), tmp_path)
    for member, accuracy in zip(plan.members, top1):
        if accuracy is not None:
            finish(plan.selection(member), held_out_top1=accuracy, parameters_M=1.0, multiply_adds_M=2.0)
    return plan


def test_the_best_on_held_out_images_is_trained_in_full(tmp_path):
    plan = made_up_plan(tmp_path, [0.3, 0.7, 0.7], "--final-seeds", 2, "--seed", 5)
    assert plan.best("random").name == "random-2"  # the first of equal ones
    finals = [task for task in plan.tasks() if task.kind == "final"]
    assert [task.name for task in finals] == ["random-2-final-seed-6", "random-2-final-seed-7"]
    assert [task.part for task in finals] == [4, 5]
    for task in finals:
        assert (task.config.hold_out, task.config.epochs) == (0.0, 600)
    assert finals[0].config.genotype == str(resolve("random:7"))


def test_final_trainings_wait_for_every_selection_that_has_not_failed(tmp_path):
    plan = made_up_plan(tmp_path, [0.3, None, 0.7])
    assert not [task for task in plan.tasks() if task.kind == "final"]
    finals = [task for task in plan.tasks(failed=["random-2-selection"]) if task.kind == "final"]
    assert [task.name for task in finals] == ["random-3-final-seed-1"]


def test_every_published_cell_is_trained_in_full_and_every_member_on_demand(tmp_path):
    plan = made_up_plan(tmp_path / "best", [0.3, 0.7, 0.5, 0.6], "--random", 2, "--cells", "DARTS_V2", "DARTS_V1")
    names = [task.name for task in plan.tasks() if task.kind == "final"]
    assert names == ["random-2-final-seed-1", "DARTS_V2-final-seed-1", "DARTS_V1-final-seed-1"]
    plan = made_up_plan(tmp_path / "all", [0.3, 0.7], "--finals", "all")
    assert [task.name for task in plan.tasks() if task.kind == "final"] == [
        "random-1-final-seed-1",
        "random-2-final-seed-1",
    ]


def test_options_reach_the_runs(tmp_path):
    words = ("--dataset", "folder", "--data-path", "my images", "--image-size", 48, "--workers", 0, "--device", "cpu")
    search = "--order first --w_lr 0.1 --early-stop --primitives skip_connect,sep_conv_3x3"
    options = options_of(*words, "--skip-bad-images", "--search", search, "--augment", "--layers=5", "--seed", 3)
    plan = Plan(options, tmp_path)
    config = plan.search(plan.members[1]).config
    assert (config.order, config.w_lr, config.early_stop, config.seed) == ("first", 0.1, True, 5)
    assert config.primitives == "skip_connect,sep_conv_3x3"
    random_member = next(member for member in plan.members if member.kind == "random")
    selection, final = plan.selection(random_member).config, plan.final(random_member, 9).config
    assert (selection.epochs, selection.hold_out, selection.layers, selection.seed) == (100, 0.1, 5, 3)
    assert (final.epochs, final.hold_out, final.layers, final.seed) == (600, 0.0, 5, 9)
    for run in (config, selection, final):
        assert (run.dataset, run.data_path, run.image_size, run.workers) == ("folder", "my images", 48, 0)
        assert (run.device, run.skip_bad_images) == ("cpu", True)


def test_the_defaults_are_the_papers(tmp_path):
    plan = Plan(options_of("--dataset", "cifar10"), tmp_path)
    assert [member.kind for member in plan.members] == ["search"] * 4 + ["random"] * 4
    assert (
        plan.search(plan.members[0]).config.as_dict()
        == SearchConfig(
            ["--dataset", "cifar10", "--seed", "1", "--name", "search-1", "--runs-path", str(tmp_path)]
        ).as_dict()
    )
    assert plan.options.select_epochs == 100
    assert AugmentConfig(["--genotype", "DARTS_V2", *plan.options.augment]).epochs == 600


def test_random_cells_of_equal_cost(tmp_path):
    plan = Plan(options_of("--searches", 0, "--random", 2, "--like", "DARTS_V2"), tmp_path)
    cells = [member.genotype for member in plan.members]
    assert len(set(cells)) == 2
    assert str(DARTS_V2) not in cells
    assert all(len(resolve(cell).normal) == len(DARTS_V2.normal) for cell in cells)


def test_random_cells_are_of_the_searches_space(tmp_path):
    search = "--nodes 2 --primitives skip_connect,none,sep_conv_3x3,avg_pool_3x3"
    plan = Plan(options_of("--searches", 1, "--random", 30, "--search", search), tmp_path)
    cells = [resolve(member.genotype) for member in plan.members if member.kind == "random"]
    assert all(len(cell.normal) == len(cell.reduce) == 2 for cell in cells)
    drawn = {op for cell in cells for gene in (cell.normal, cell.reduce) for node in gene for op, _ in node}
    assert drawn == {"skip_connect", "sep_conv_3x3", "avg_pool_3x3"}
    space = {"nodes": 2, "primitives": "skip_connect,none,sep_conv_3x3,avg_pool_3x3"}
    assert results_of(plan, "0123456789ab")["search_space"] == space
    same = options_of(
        "--searches", 0, "--random", 30, "--search", search.replace("skip_connect,none", "none,skip_connect")
    )
    assert [member.genotype for member in Plan(same, tmp_path).members] == list(map(str, cells))
    own = Plan(options_of("--searches", 1, "--random", 2), tmp_path)
    assert [member.genotype for member in own.members[1:]] == [str(resolve("random:1")), str(resolve("random:2"))]


def test_a_run_with_other_options_in_a_members_place_is_refused(tmp_path):
    plan = made_up_plan(tmp_path, [0.3])
    other = Plan(options_of("--random", 1, "--searches", 0, "--augment", "--lr 0.5"), tmp_path)
    with pytest.raises(ValueError, match="run with --lr"):
        other.selection(plan.members[0]).summary()


def test_runs_on_other_images_are_refused(tmp_path):
    """As with another --data-path, which may change when a protocol goes on: the folder may have been moved."""
    plan = Plan(options_of("--random", 2, "--searches", 0), tmp_path)
    for member, digest in zip(plan.members, ("01234567", "89abcdef")):
        cost = {"parameters_M": 1.0, "multiply_adds_M": 2.0}
        finish(plan.selection(member), held_out_top1=0.5, training_fingerprint=digest, **cost)
    with pytest.raises(ValueError, match=r"random-2-selection is of other images than .*random-1-selection"):
        results_of(plan, "0123456789ab")


def test_results_are_small_enough_to_be_committed(tmp_path):
    """With five searches and five random cells, all trained in full with a seed."""
    plan = Plan(options_of("--searches", 5, "--random", 5, "--cells", "DARTS_V2", "--finals", "all"), tmp_path)
    origin = {
        "training_fingerprint": "0123456789abcdef",
        "held_out_fingerprint": "0123456789abcdef",
        "seconds": 1234.567891,
        "version": "0123456789ab-dirty",
        "machine": "NVIDIA H100 80GB HBM3; torch 2.14.1",
    }
    for member in plan.members:
        if member.kind == "search":
            verdict = "settled: the genotype has been the same for 12 epochs, and half of its choices lead by more than"
            found = {"valid_top1": 0.123456, "eigenvalue": 0.123456, "verdict": verdict, "genotype": str(DARTS_V2)}
            finish(plan.search(member), **found, **origin)
        cost = {"parameters_M": 3.351502, "multiply_adds_M": 520.123456}
        finish(plan.selection(member), held_out_top1=0.123456, **cost, **origin)
        finish(plan.final(member, 1), test_top1=0.123456, **cost, **origin)
    write_json(tmp_path / "results.json", results_of(plan, "0123456789ab"))
    assert (tmp_path / "results.json").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--search", "--dataset cifar10"), "--search: --dataset is given once, to protocol.py itself"),
        (("--augment", "--workers=3"), "--augment: --workers is given once, to protocol.py itself"),
        (("--search", "--seed 3"), "--search: --seed is set by protocol.py"),
        (("--augment", "--hold_out 0.2"), "--augment: --hold-out is set by protocol.py"),
        (("--augment", "--genotype DARTS_V2"), "--augment: --genotype is set by protocol.py"),
        (("--search", "--layrs 3"), "unrecognized arguments: --layrs"),
        (("--search", "--epochs 0"), "--search: error: argument --epochs: must be a whole number of at least 1"),
        (("--search", "--early-stop --eigenvalue-images 0"), "--early-stop needs the eigenvalue"),
        (("--augment", "--layers '3"), "No closing quotation"),
        (("--search", "--epochs 3", "--random", "-1"), "of at least 0"),
        (("--cells", "DARTS_V9"), "DARTS_V2"),
        (("--cells", "DARTS_V2", "DARTS_V2"), "different cells"),
        (("--hold-out", "0"), "above 0"),
        (("--searches", 0, "--random", 0), "nothing to run"),
        (("--gpus", "0", "--device", "cpu"), "leave --device out"),
        (("--member", 99), "parts: 1 to 4 searches, 5 to 8 random cells, 9 to 10 final trainings"),
        (("--member", 9), "it needs parts 1 to 8"),
        (("--like", "DARTS_V9"), "neither a published cell"),
        (("--name", "../x"), "without slashes"),
        (("--name", "DARTS_V2"), "--label 'DARTS_V2': must be"),
        (("--label", "random cells"), "none of random cells, DARTS_V1"),
        (("--label", "a|b"), "without |"),
        (("--label", "a\nb"), "one line"),
    ],
)
def test_mistakes_are_one_line(words, mention, tmp_path, monkeypatch, capsys):
    error = main_fails(words, tmp_path, monkeypatch, capsys)
    assert mention in error
    assert error.count("\n") == 1


def main_fails(words, cwd, monkeypatch, capsys):
    """Standard error of a command that is refused before it runs anything."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["protocol.py", *map(str, words)])
    monkeypatch.setattr(protocol, "Child", None)
    with pytest.raises(SystemExit) as stop:
        protocol.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (("--select-epochs", 3), "--select-epochs 2, not 3"),
        (("--seed", 7), "--seed 0, not 7"),
        (("--search", "--order first"), "not '--order first'"),
        (("--random", 9), "--random 1, not 9"),
    ],
)
def test_other_options_than_those_of_the_folder_are_one_line(words, mention, tmp_path, monkeypatch, capsys):
    options = options_of(*PROTOCOL)
    folder = tmp_path / "runs/protocol/digits"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {n: v for n, v in vars(options).items() if n not in protocol.NOT_SAVED})
    assert mention in main_fails([*PROTOCOL, *words], tmp_path, monkeypatch, capsys)


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    precious = tmp_path / "runs/protocol/digits/precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert "no protocol's" in main_fails(PROTOCOL, tmp_path, monkeypatch, capsys)
    assert list(precious.parent.iterdir()) == [precious]


def test_what_is_left_is_estimated_from_what_was_measured(tmp_path):
    plan = made_up_plan(tmp_path, [0.5, None, None], "--select-epochs", 4, "--augment", "--epochs 8", "--hold-out", 0.5)
    # a selection epoch took 1 s / 4; left are 2 selections of 4 epochs, and a final training of 8 of twice the images
    assert protocol.status(plan, [], 1) == "left: 2 of 3 selection runs, 1 of 1 final runs; about 0:00:06"
    assert protocol.status(plan, [], 2).endswith("about 0:00:03")
    unknown = Plan(options_of(), tmp_path / "unknown")
    assert protocol.status(unknown, [], 1).endswith("; no time is known yet of search and selection and final runs")
    # a run that has gone through half of its second epoch in a second
    log = unknown.search(unknown.members[0]).folder.log
    log.parent.mkdir(parents=True)
    log.write_text("2026-01-01 00:00:00  epoch 2/50  train  step 5/10  loss 1.0\n")
    assert unknown.search(unknown.members[0]).epochs_done() == 1.5
    log.write_text(log.read_text() + "2026-01-01 00:00:00  epoch 2/50  valid  loss 1.0\n")
    assert unknown.search(unknown.members[0]).epochs_done() == 2.0
    running = SimpleNamespace(task=unknown.search(unknown.members[0]), seconds_per_epoch=lambda: 2.0)
    assert protocol.seconds_per_epoch(unknown, "search", [], [running]) == 2.0
    # four searches of 50 epochs, less the two that are done, of 2 s each
    assert "; about 0:06:36, no time is known yet of selection" in protocol.status(unknown, [running], 1)


def test_every_option_has_help_and_stands_in_a_named_group():
    parser = build_parser()
    assert all(action.help for action in parser._actions)
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert "positional arguments" not in titles
