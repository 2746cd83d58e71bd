"""protocol.py: the whole experiment as one command, which goes on after any interruption."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
from comparing import differences, outcome
from conftest import ROOT, run_script

import protocol
import report.comparison  # noqa: F401 -- for a test to replace its `write`
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2, resolve
from running.folder import write_json
from running.members import Plan, results_of
from running.protocol_options import build_parser, read_options

SMALL = "--layers 3 --init-channels 2 --batch-size 256 --checkpoint-minutes 0"
PROTOCOL = (
    *("--searches", 1, "--random", 1, "--select-epochs", 2, "--final-seeds", 1, "--workers", 0, "--hold-out", 0.2),
    *("--search", f"{SMALL} --epochs 2 --nodes 2 --eigenvalue-images 1"),
    *("--augment", f"{SMALL} --epochs 2"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A protocol on the digits that was left alone: the folder that it was started in."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    process = run_script("protocol.py", *PROTOCOL, cwd=cwd, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    (cwd / "seconds.txt").write_text(str(time.monotonic() - begun))
    return cwd


def results(cwd):
    return json.loads((cwd / "runs/protocol/digits/results.json").read_text())


def without_seconds(content):
    """A results.json without seconds; and without the program's version, since a commit may fall between two runs."""
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items() if name not in ("seconds", "version")}
    return list(map(without_seconds, content)) if isinstance(content, list) else content


def start(cwd):
    """protocol.py in a process group of its own."""
    command = list(map(str, [sys.executable, ROOT / "protocol.py", *PROTOCOL]))
    process = subprocess.Popen(
        command, cwd=cwd, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started.append(process)
    return process


started = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    for process in started:
        if process.poll() is None:
            kill_group(process.pid)
            process.communicate()
    started.clear()


def disturb(cwd, reference, ways, generator):
    """Start the protocol and end it after a random time, in each of these ways; then let it end.

    These times are together about as long as the undisturbed protocol took, so that each of its runs is met.
    """
    longest = 2 * float((reference / "seconds.txt").read_text()) / len(ways)
    for way in ways:
        process = start(cwd)
        time.sleep(generator.uniform(0, longest))
        if process.poll() is None:
            way(process.pid)
        process.communicate()
    process = start(cwd)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output


def kill_group(pid):
    os.killpg(pid, signal.SIGKILL)


def kill_alone(pid):
    """As when a machine runs out of memory: what it was running must end too, and not run twice."""
    os.kill(pid, signal.SIGKILL)


def interrupt_group(pid):
    """As a terminal's Ctrl-C does."""
    os.killpg(pid, signal.SIGINT)


def terminate(pid):
    os.kill(pid, signal.SIGTERM)


def assert_same(cwd, reference):
    """The same results but for seconds, and the same bits in all runs."""
    assert without_seconds(results(cwd)) == without_seconds(results(reference))
    runs = [path.parent for path in sorted((reference / "runs/protocol/digits").rglob("summary.json"))]
    assert len(runs) == 5
    for run in runs:
        left, expected = outcome(cwd / run.relative_to(reference)), outcome(run)
        # with summary.json a search is over, and what it says after that, of its cell's cost, is lost if it is killed
        for values in (left, expected):
            values["log.txt"] = [
                line for line in values["log.txt"] if not re.match(r"train the cell|timing|the network", line)
            ]
        assert not differences(left, expected), run


@pytest.mark.process
def test_what_a_protocol_leaves(undisturbed):
    content = results(undisturbed)
    search, chance = content["members"]
    assert (search["name"], search["seed"], chance["name"], chance["seed"]) == ("search-1", 1, "random-1", 1)
    assert chance["genotype"] == str(resolve("random:1"))
    folder = undisturbed / "runs/protocol/digits"
    assert search["genotype"] == json.loads((folder / "search/search-1/summary.json").read_text())["genotype"]
    assert content["selected"] == {"search": "search-1", "random": "random-1"}
    for member in content["members"]:
        selection = json.loads((folder / f"augment/{member['name']}-selection/summary.json").read_text())
        final = json.loads((folder / f"augment/{member['name']}-final-seed-1/summary.json").read_text())
        assert member["held_out_top1"] == selection["held_out_top1"]
        assert member["multiply_adds_M"] == final["multiply_adds_M"] > 0
        assert [(run["seed"], run["test_top1"]) for run in member["final"]] == [(1, final["test_top1"])]
        options = json.loads((folder / f"augment/{member['name']}-selection/config.json").read_text())
        assert (options["hold_out"], options["epochs"], options["genotype"]) == (0.2, 2, member["genotype"])
    assert {"epochs", "verdict", "eigenvalue", "seconds", "version", "machine"} <= search["search"].keys()
    assert content["version"]
    assert (folder / "report.html").is_file()


@pytest.mark.process
def test_a_protocol_that_is_over_starts_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("checkpoint.pt")}
    process = run_script("protocol.py", *PROTOCOL, cwd=undisturbed, timeout=600)
    assert process.returncode == 0
    assert "nothing is left" in process.stdout
    assert "starts" not in process.stdout
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("checkpoint.pt")} == before


@pytest.mark.process
def test_killed_or_stopped_at_random_instants_it_ends_with_the_same_results(undisturbed, tmp_path):
    disturb(tmp_path, undisturbed, [kill_group, kill_alone], random.Random(0))
    assert_same(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_ten_random_instants_it_ends_with_the_same_results(undisturbed, tmp_path, seed):
    disturb(tmp_path, undisturbed, [kill_group] * 4 + [interrupt_group] * 2 + [kill_alone] * 4, random.Random(seed))
    assert_same(tmp_path, undisturbed)


def wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None


@pytest.mark.process
@pytest.mark.parametrize("stop", [interrupt_group, terminate])
def test_a_signal_lets_the_run_save_and_stop(tmp_path, stop):
    process = start(tmp_path)
    log = tmp_path / "runs/protocol/digits/search/search-1/log.txt"
    wait_for(lambda: log.exists() and "for alpha" in log.read_text(), process)
    stop(process.pid)
    output = process.communicate()[0].decode()
    assert process.returncode == 128 + {interrupt_group: signal.SIGINT, terminate: signal.SIGTERM}[stop], output
    assert "stopped; the same command goes on" in output
    assert "failed" not in output
    assert ": stopped after step" in log.read_text().splitlines()[-1]


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_no_run_outlives_a_protocol_that_was_killed(tmp_path):
    process = start(tmp_path)
    log = tmp_path / "runs/protocol/digits/search/search-1/log.txt"
    wait_for(log.exists, process)
    (child,) = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and parent_of(pid) == process.pid]
    kill_alone(process.pid)
    process.communicate()  # which ends when nobody holds the child's copy of the output
    while parent_of(child) is not None:
        time.sleep(0.02)


def parent_of(pid):
    """The parent's id of a process that runs, else None."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, parent = stat.read().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


@pytest.mark.process
def test_selection_never_reads_the_test_images(image_folder, tmp_path):
    root = image_folder()
    words = [*PROTOCOL, "--dataset", "folder", "--data-path", root, "--image-size", 12]
    process = run_script("protocol.py", *words, "--final-seeds", 0, cwd=tmp_path, timeout=600)
    assert process.returncode == 0, process.stderr
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"poison")
    process = run_script("protocol.py", *words, "--name", "poisoned", cwd=tmp_path, timeout=600)
    assert process.returncode == 2
    clean, poisoned = (
        json.loads((tmp_path / f"runs/protocol/{name}/results.json").read_text()) for name in ("folder", "poisoned")
    )
    assert poisoned["selected"] == clean["selected"]
    for one, other in zip(clean["members"], poisoned["members"]):
        assert other["final"] == []  # the final trainings met the poison
        assert without_seconds(one) == without_seconds(other)
    assert process.stderr.count("cannot read the image") == 2


# With runs that are pretended, and end at once


class Pretended:
    """A `Child` that runs nothing: after some looks at it the run is over, or has failed if it is in `failing`."""

    failing: ClassVar = set()
    at_a_time: ClassVar = []  # how many were running when each started
    running = 0

    def __init__(self, task, gpu, n_slots):
        self.task, self.gpu, self.looks = task, gpu, 0
        self.needed = 1 + len(task.name) % 3
        Pretended.running += 1
        Pretended.at_a_time.append(Pretended.running)

    def is_over(self):
        self.looks += 1
        if self.looks == self.needed:
            Pretended.running -= 1
            if self.error() is None:
                seed = self.task.config.seed
                top1 = random.Random(f"{self.task.kind} {self.task.words}").random()  # the same for the same options
                finish(
                    self.task,
                    **{"genotype": str(resolve(f"random:{100 + seed}")), "valid_top1": top1, "verdict": "settled"},
                    **{"eigenvalue": None, "held_out_top1": top1, "test_top1": top1},
                    **{"parameters_M": 1.0, "multiply_adds_M": 2.0},
                )
        return self.looks >= self.needed

    def error(self):
        return "out of luck" if self.task.name in self.failing else None

    def seconds_per_epoch(self):
        return None


@pytest.fixture
def pretend(tmp_path, monkeypatch, capsys):
    """A function that runs protocol.py in a folder of this name, and returns (standard output, results.json)."""
    monkeypatch.setattr(protocol, "Child", Pretended)
    monkeypatch.setattr(protocol, "POLL_SECONDS", 0)
    monkeypatch.setattr("report.comparison.write", lambda results, path: None)  # which takes seconds

    def run(name, *words):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        words = ("--searches", 3, "--random", 2, "--cells", "DARTS_V2", "--final-seeds", 2, *words)
        monkeypatch.setattr(sys, "argv", ["protocol.py", *map(str, words)])
        Pretended.at_a_time.clear()
        protocol.main()
        return capsys.readouterr().out, results(tmp_path / name)

    return run


def test_runs_are_started_once_each_and_one_at_a_time(pretend):
    output, _ = pretend("once")
    assert output.count(" starts; ") == output.count(" is over; ") == 3 + 6 + 6
    assert set(Pretended.at_a_time) == {1}
    output, _ = pretend("once")
    assert "nothing is left" in output
    assert " starts; " not in output


def test_several_at_a_time_make_the_same_results(pretend, monkeypatch):
    _, expected = pretend("alone")
    monkeypatch.setattr(protocol, "slots", lambda gpus: ["0", "1", "2"])
    output, content = pretend("together")
    assert max(Pretended.at_a_time) == 3
    assert output.count(" starts; ") == 15
    assert content == expected


def test_parts_one_by_one_make_the_same_results(pretend, capsys):
    """As a job array does."""
    _, expected = pretend("alone")
    with pytest.raises(SystemExit):
        pretend("parts", "--member", 7)
    assert "--member 7 is a final training; it needs parts 1 to 6" in capsys.readouterr().err
    for part in (6, 2, 1, 5, 3, 4, 12, 7, 9, 8, 10, 11):
        output, content = pretend("parts", "--member", part)
        assert output.count(" starts; ") == (2 if part <= 3 else 1)
    assert content == expected
    assert "nothing is left" in pretend("parts")[0]


def test_a_run_that_fails_is_named_and_the_rest_goes_on(pretend, tmp_path, monkeypatch, capsys):
    _, expected = pretend("lucky")
    best = expected["selected"]["search"]
    monkeypatch.setattr(Pretended, "failing", {f"{best}-selection", "search-1", "DARTS_V2-final-seed-1"} - {best})
    with pytest.raises(SystemExit) as stop:
        pretend("unlucky")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{best}-selection failed: out of luck; " in error
    assert "the same command tries again" in error
    content = results(tmp_path / "unlucky")
    assert content["selected"]["search"] not in (None, best)
    assert len(next(m for m in content["members"] if m["name"] == content["selected"]["search"])["final"]) == 2
    monkeypatch.setattr(Pretended, "failing", set())
    assert pretend("unlucky")[1] == expected  # tried again, selected anew


# Without runs


def options_of(*words):
    return read_options(list(map(str, words)))


def made_up_plan(tmp_path, top1, *words):
    """A plan whose selection trainings are over, with these accuracies on the held-out images."""
    plan = Plan(options_of("--random", len(top1), "--searches", 0, *words), tmp_path)
    for member, accuracy in zip(plan.members, top1):
        if accuracy is not None:
            finish(plan.selection(member), held_out_top1=accuracy, parameters_M=1.0, multiply_adds_M=2.0)
    return plan


def finish(task, **summary):
    """Leave the folder of a run that is over."""
    task.folder.path.mkdir(parents=True)
    write_json(task.folder.config, task.config.as_dict())
    write_json(task.folder.summary, {"seconds": 1.0, "epochs": task.config.epochs} | summary)


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
    search = "--order first --w_lr 0.1 --early-stop"
    options = options_of(*words, "--skip-bad-images", "--search", search, "--augment", "--layers=5", "--seed", 3)
    plan = Plan(options, tmp_path)
    config = plan.search(plan.members[1]).config
    assert (config.order, config.w_lr, config.early_stop, config.seed) == ("first", 0.1, True, 5)
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


def test_a_run_with_other_options_in_a_members_place_is_refused(tmp_path):
    plan = made_up_plan(tmp_path, [0.3])
    other = Plan(options_of("--random", 1, "--searches", 0, "--augment", "--lr 0.5"), tmp_path)
    with pytest.raises(ValueError, match="run with --lr"):
        other.selection(plan.members[0]).summary()


def test_results_are_small_enough_to_be_committed(tmp_path):
    """With five searches and five random cells, all trained in full with a seed."""
    plan = Plan(options_of("--searches", 5, "--random", 5, "--cells", "DARTS_V2", "--finals", "all"), tmp_path)
    origin = {"seconds": 1234.567891, "version": "0123456789ab-dirty", "machine": "NVIDIA H100 80GB HBM3; torch 2.14.1"}
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
