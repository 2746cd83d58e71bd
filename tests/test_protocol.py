"""protocol.py: the whole experiment as one command, which goes on after any interruption."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time

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


def results(cwd, name="digits"):
    return json.loads((cwd / f"runs/protocol/{name}/results.json").read_text())


def without_seconds(content):
    """A results.json without seconds, and without the program's version, since a commit may fall between two runs."""
    if isinstance(content, dict):
        return {name: without_seconds(value) for name, value in content.items() if name not in ("seconds", "version")}
    return list(map(without_seconds, content)) if isinstance(content, list) else content


@pytest.fixture
def start(tmp_path):
    """A function that starts protocol.py in a process group of its own. All of them are killed after the test."""
    started = []

    def start_one():
        command = [sys.executable, ROOT / "protocol.py", *map(str, PROTOCOL)]
        process = subprocess.Popen(
            command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            kill_group(process.pid)
            process.communicate()


def kill_group(pid):
    os.killpg(pid, signal.SIGKILL)


def interrupt_group(pid):
    """Like Ctrl-C in a terminal."""
    os.killpg(pid, signal.SIGINT)


@pytest.mark.process
def test_what_a_protocol_leaves(undisturbed):
    content = results(undisturbed)
    assert content["version"]
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
        of_selection, of_final = (run["fingerprints"] for run in (member["selection"], *member["final"]))
        assert (of_selection.keys(), of_final.keys()) == ({"training", "held_out"}, {"training", "test"})
        assert of_selection["training"] != of_final["training"] == search["search"]["fingerprints"]["training"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("ways", "seed"),
    [
        pytest.param([kill_group] * 2, 0, marks=pytest.mark.process),
        pytest.param([kill_group] * 6 + [interrupt_group] * 3, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_or_stopped_at_random_instants_it_ends_with_the_same_results(ways, seed, undisturbed, start, tmp_path):
    """The same results but for seconds, and the same bits in all runs.

    The times before the kills are together about as long as the undisturbed protocol took, so that each run is met.
    """
    generator = random.Random(seed)
    longest = 2 * float((undisturbed / "seconds.txt").read_text()) / len(ways)
    for way in ways:
        process = start()
        time.sleep(generator.uniform(0, longest))
        if process.poll() is None:
            way(process.pid)
        process.communicate()
    process = start()
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert without_seconds(results(tmp_path)) == without_seconds(results(undisturbed))
    runs = [path.parent for path in sorted((undisturbed / "runs/protocol/digits").rglob("summary.json"))]
    assert len(runs) == 5
    for run in runs:
        assert not differences(outcome(tmp_path / run.relative_to(undisturbed)), outcome(run)), run


@pytest.mark.process
def test_a_signal_lets_the_run_save_and_stop(start, tmp_path):
    process = start()
    log = tmp_path / "runs/protocol/digits/search/search-1/log.txt"
    while process.poll() is None and not (log.exists() and "for alpha" in log.read_text()):
        time.sleep(0.02)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert ": stopped after step" in log.read_text().splitlines()[-1]


# With runs that are pretended, and end at once


def finish(task, **summary):
    """Leave the folder of a run that is over."""
    folder = task.config.folder()
    folder.path.mkdir(parents=True)
    write_json(folder.config, task.config.as_dict())
    origin = {"seconds": 1.0, "epochs": task.config.epochs, "version": "0123456789ab", "machine": "a CPU"}
    write_json(folder.summary, origin | summary)


class PretendedRuns:
    """Stands in for `protocol.run_child`: a run ends by itself, or fails if its name is in `failing`."""

    def __init__(self):
        self.failing, self.started, self.n_running, self.most_running = set(), [], 0, 0

    async def __call__(self, task, gpu, n_gpus, stop_signals):
        self.started.append(task.name)
        self.n_running += 1
        self.most_running = max(self.most_running, self.n_running)
        for _ in range(len(task.name) % 3 + 1):
            await asyncio.sleep(0)  # lets others run
        self.n_running -= 1
        if task.name in self.failing:
            return 2
        config = task.config
        options = config.seed, config.epochs, getattr(config, "genotype", None)
        top1 = random.Random(str(options)).random()  # the same for the same options
        finish(
            task,
            **{"genotype": str(resolve(f"random:{100 + config.seed}")), "valid_top1": top1, "verdict": "settled"},
            **{"eigenvalue": None, "held_out_top1": top1, "test_top1": top1},
            **{"parameters_M": 1.0, "multiply_adds_M": 2.0},
        )
        return 0


@pytest.fixture
def pretended(monkeypatch):
    runs = PretendedRuns()
    monkeypatch.setattr(protocol, "run_child", runs)
    monkeypatch.setattr("report.comparison.write", lambda results, path: None)  # which takes seconds
    return runs


@pytest.fixture
def pretend(pretended, tmp_path, monkeypatch):
    """A function that runs protocol.py in a folder of this name, and returns (names of started runs, results.json)."""

    def run(name, *words):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        words = ("--searches", 3, "--random", 2, "--cells", "DARTS_V2", "--final-seeds", 2, *words)
        monkeypatch.setattr(sys, "argv", ["protocol.py", *map(str, words)])
        pretended.started.clear()
        protocol.main()
        return list(pretended.started), results(tmp_path / name)

    return run


def test_runs_are_started_once_each_and_several_at_a_time_make_the_same_results(pretend, pretended, monkeypatch):
    started, expected = pretend("alone")
    assert len(started) == len(set(started)) == 3 + 6 + 6
    assert started[:3] == ["search-1", "search-1-selection", "search-2"]
    assert pretended.most_running == 1
    assert pretend("alone")[0] == []
    monkeypatch.setattr("machine.ranks.visible_gpus", lambda gpus: ["0", "1", "2"])
    started, content = pretend("together", "--gpus", "all")
    assert (len(started), pretended.most_running) == (15, 3)
    assert content == expected


def test_jobs_one_by_one_make_the_same_results(pretend, capsys):
    """Like a job array."""
    _, expected = pretend("alone")
    with pytest.raises(SystemExit):
        pretend("jobs", "--member", 7)
    assert "--member 7 can't run now: jobs 1 to 6 are the members" in capsys.readouterr().err
    for job in (6, 2, 1, 5, 3, 4, 12, 7, 9, 8, 10, 11):
        started, content = pretend("jobs", "--member", job)
        assert len(started) == (2 if job <= 3 else 1)
    assert content == expected
    assert pretend("jobs")[0] == []


def test_a_run_that_fails_is_named_and_the_rest_goes_on(pretend, pretended, tmp_path, capsys):
    _, expected = pretend("lucky")
    best = expected["selected"]["search"]
    pretended.failing = {f"{best}-selection", "DARTS_V2-final-seed-1"}
    with pytest.raises(SystemExit) as stop:
        pretend("unlucky")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{best}-selection, DARTS_V2-final-seed-1 failed; run the same command to try again" in error
    content = results(tmp_path / "unlucky")
    assert content["selected"]["search"] not in (None, best)
    assert len(next(m for m in content["members"] if m["name"] == content["selected"]["search"])["final"]) == 2
    pretended.failing = set()
    assert pretend("unlucky")[1] == expected  # tried again, selected anew
