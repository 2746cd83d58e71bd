"""protocol.py: the whole experiment as one command, which goes on after any interruption."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
from comparing import differences, outcome
from conftest import ROOT, run_script

import protocol
import report.comparison  # noqa: F401 -- for a test to replace its `write`
from genotypes import random_genotypes, resolve
from run.folder import write_json

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
    assert chance["genotype"] == str(random_genotypes(1, 1, n_nodes=2)[0])  # of the search's space
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
        of_selection, of_final = (run["fingerprints"] for run in (member["selection"], *member["final"]))
        assert (of_selection.keys(), of_final.keys()) == ({"training", "held_out"}, {"training", "test"})
        assert of_selection["training"] != of_final["training"] == search["search"]["fingerprints"]["training"]
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


def finish(task, **summary):
    """Leave the folder of a run that is over."""
    task.folder.path.mkdir(parents=True)
    write_json(task.folder.config, task.config.as_dict())
    write_json(task.folder.summary, {"seconds": 1.0, "epochs": task.config.epochs} | summary)


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
