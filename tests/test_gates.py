"""What a stranger hands over is refused in one line before anything is touched: run folders, options, checkpoints.

The files of real runs are spoilt in many ways; what is not refused must be harmless.
"""

import copy
import dataclasses
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import zipfile
from itertools import islice

import pytest
import torch
from comparing import differences, outcome
from conftest import ROOT

import augment
import export
import search
import visualize
from config import AugmentConfig, SearchConfig
from models.augment_cnn import AugmentCNN
from models.search_cnn import SearchCNN
from report.story import read
from running import ranks
from running.checkpoint_checks import check_fits
from running.checkpoints import load_checkpoint, save_checkpoint
from running.data_sets import DATASETS
from running.errors import UserError, user_errors_in_one_line
from running.folder import RunFolder, write_temporary
from running.forms import Optional, misfit, whole
from running.loading import Images, Loader, LoadingError
from running.run import Run

SMALL = [
    *("--layers", "1", "--init-channels", "2", "--batch-size", "64", "--workers", "0", "--epochs", "2"),
    *("--device", "cpu", "--runs-path", "{}"),
]
STAGES = {
    "search": (search.main, [*SMALL, "--nodes", "1", "--eigenvalue-images", "1"]),
    "augment": (augment.main, [*SMALL, "--genotype", "DARTS_V1", "--aux-weight", "0"]),
}


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    """Runs in this process learn from a part of the digits, and do not measure how fast their cells are."""
    digits = DATASETS["digits"]

    def load(*args, **options):
        source, labels, n_classes = digits.load(*args, **options)
        return list(islice(source, 200)), labels[:200], n_classes

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "digits", dataclasses.replace(digits, load=load))
        patch.setattr("search.show_cost", lambda *args: None)
        patch.setattr("augment.describe_latency", lambda *args: "no time")
        yield


def command(main, words):
    """Run a script in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", *map(str, words)])
        try:
            with user_errors_in_one_line("script"):
                main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """stage -> the folder of a finished run."""
    path = str(tmp_path_factory.mktemp("finished"))
    for main, words in STAGES.values():
        assert command(main, [word.format(path) for word in words]) == 0
    return {stage: RunFolder(f"{path}/{stage}/digits").path for stage in STAGES}


@pytest.fixture
def copied(finished, tmp_path):
    """stage -> a copy of the folder, to be spoilt."""
    return {
        stage: shutil.copytree(path, tmp_path / stage, copy_function=shutil.copy) for stage, path in finished.items()
    }


def refused(capsys, main, words, *mentions):
    """Whether a command ends with exit code 2 and one short line, which is returned."""
    capsys.readouterr()
    assert command(main, words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert len(lines[0]) < 2000
    for mention in mentions:
        assert mention in lines[0]


# A run's folder

ODD_ENTRIES = {
    "a link": lambda path, victim: path.symlink_to(victim),
    "a link to nothing": lambda path, victim: path.symlink_to(victim.with_name("nothing")),
    "a pipe": lambda path, victim: os.mkfifo(path),
    "a hard link": lambda path, victim: os.link(victim, path),
}


@pytest.mark.parametrize("kind", ODD_ENTRIES)
@pytest.mark.parametrize(
    "name",
    ["config.json", "log.txt", "launcher.txt", "lock", "history.json", "plots/x.png", "tb/events.x", "a/b/c.txt"],
)
def test_a_folder_with_anything_but_files_and_folders_is_refused_and_nothing_is_written(
    kind, name, copied, tmp_path, capsys
):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = copied["search"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    ODD_ENTRIES[kind](path, victim)
    before = sorted(os.listdir(copied["search"]))
    for main, words in (
        (search.main, ["--resume", copied["search"]]),
        (visualize.main, [copied["search"], copied["search"]]),
    ):
        refused(capsys, main, words, path.name)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(copied["search"])) == before


@pytest.mark.parametrize("name", ["plots", "tb"])
def test_folders_that_are_links_are_refused(name, copied, tmp_path, capsys):
    shutil.rmtree(copied["search"] / name)
    (tmp_path / "elsewhere").mkdir()
    (copied["search"] / name).symlink_to(tmp_path / "elsewhere")
    refused(capsys, search.main, ["--resume", copied["search"]], name, "a link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "log.txt", "plots", "tb", "lock", "config.json.tmp"])
def test_a_folder_for_a_file_and_a_file_for_a_folder_are_one_line(name, copied, capsys):
    path = copied["search"] / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    (copied["search"] / "previous.pt").unlink()
    refused(capsys, search.main, ["--resume", copied["search"]])


def test_a_temporary_file_is_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "x.json.tmp").symlink_to(victim)
    temporary = write_temporary(tmp_path / "x.json", b"new")
    assert (victim.read_text(), temporary.read_text(), temporary.is_symlink()) == ("mine", "new", False)


# Options in config.json

OF_THE_COMMAND = {
    "overwrite": True,
    "gpus": "all",
    "auto_resume": True,
    "resume": "/",
    "evaluate": "x",
    "mirror": True,
    "help": True,
}
ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    2**70,
    1e400,
    float("nan"),
    0.5,
    "",
    "x" * 10**6,
    "\0",
    "\ud800",
    "--overwrite",
    "-1",
    [],
    {},
    [[[1]]],
    {"a": {"b": 1}},
    "all",
    "../../x",
]


@pytest.mark.parametrize("name", OF_THE_COMMAND)
@pytest.mark.parametrize("stage", STAGES)
def test_config_json_cannot_set_what_a_command_does(name, stage, copied, capsys):
    path = copied[stage] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: OF_THE_COMMAND[name]}))
    refused(capsys, STAGES[stage][0], ["--resume", copied[stage]], "config.json", name)
    assert (copied[stage] / "checkpoint.pt").is_file()


@pytest.mark.parametrize("config", [SearchConfig, AugmentConfig])
def test_every_saved_value_passes_the_checks_of_the_command_line(config):
    saved = config(["--genotype", "DARTS_V2"] if config is AugmentConfig else []).as_dict()
    n_refused = 0
    for name in saved:
        for value in ODD_VALUES:
            try:
                restored = vars(config.restored(saved | {name: value}, "config.json"))
            except UserError:
                n_refused += 1
                continue
            option = name.replace("_", "-")
            words = (
                [] if value is None or value is False else [f"--{option}"] if value is True else [f"--{option}={value}"]
            )
            typed = vars(config.build_parser().parse_args(words))
            assert restored[name] == typed[name]
    assert n_refused > len(ODD_VALUES) * len(saved) / 2


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", "[" * 10**5, '{"epochs": ' + "9" * 10**4 + "}", "\xff"])
def test_odd_json_is_one_line(text, copied, capsys):
    for name in ("config.json", "history.json", "summary.json"):
        path = copied["search"] / name
        before = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        if (name, text) != ("history.json", "null") and (name, text) != ("summary.json", "null"):
            refused(capsys, visualize.main, [copied["search"], copied["search"]], name if text != "[]" else "")
        if name == "config.json":
            refused(capsys, search.main, ["--resume", copied["search"]], "config.json")
        path.write_bytes(before)


def spoilt(content, chance):
    """A copy of nested dicts and lists in which one value, or one key, is another."""
    content = copy.deepcopy(content)
    places = list(places_of(content))
    container, key = chance.choice(places)
    how = chance.randrange(8)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[chance.choice(["odd", 7, ""])] = container[key]
    else:
        container[key] = chance.choice(ODD_VALUES + ODD_OBJECTS)
    return content


def places_of(content):
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], (dict, list)) and len(content[key]) < 1000:
            yield from places_of(content[key])


ODD_OBJECTS = [
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(1),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(1).expand(9),
    torch.zeros(5, dtype=torch.uint8),
    torch.zeros(2, 3).to_sparse(),
    (),
    (1, 2),
    b"x",
    10**5000,
    -1e300,
    1 + 2j,
]


def reports(folder, render):
    """Whether a run's folder can be read for a report; `render`: then write the report too, which takes a second."""
    try:
        read(folder)
    except UserError:
        return False
    return command(visualize.main, [folder]) == 0 if render else True


def test_spoilt_histories_are_reported_or_refused(copied):
    chance, folder, n_read = random.Random(0), copied["search"], 0
    for name in ("history.json", "summary.json", "config.json"):
        path = folder / name
        before = json.loads(path.read_text())
        for i in range(30):
            path.write_text(json.dumps(spoilt(before, chance), default=lambda value: 7, skipkeys=True))
            n_read += reports(folder, render=i % 10 == 0)
        path.write_text(json.dumps(before))
    assert n_read < 60


def test_a_run_without_tensorboards_files_has_nothing_to_show(copied, capsys):
    shutil.rmtree(copied["search"] / "tb")
    refused(capsys, visualize.main, [copied["search"]], "no epoch is over")


def test_damaged_files_of_tensorboard_are_reported_or_refused(copied):
    (path,) = (path for path in (copied["search"] / "tb").iterdir() if path.stat().st_size > 1000)
    data, chance, n_read = path.read_bytes(), random.Random(0), 0
    for i in range(30):
        changed = bytearray(data)
        for _ in range(chance.choice([1, 10, 100])):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(changed[: chance.choice([len(data), chance.randrange(len(data))])]))
        n_read += reports(copied["search"], render=i % 10 == 0)
    assert n_read < 30


# Checkpoints


def built(stage, folder):
    """A `Run` that resumes a folder, with its network and optimizers."""
    config = {"search": SearchConfig, "augment": AugmentConfig}[stage](["--resume", str(folder)])
    run = Run(config)
    if stage == "search":
        net, w_optim, alpha_optim = search.build(SearchCNN, config, run.device, 1, 10)
        run.state = {"net": net, "w_optim": w_optim, "alpha_optim": alpha_optim}
    else:
        genotype = augment.resolve(config.genotype)
        net = augment.build(AugmentCNN, config, run.device, 8, 1, 10, genotype)
        optim = torch.optim.SGD(net.parameters(), config.lr, momentum=0.9, weight_decay=3e-4, fused=True)
        run.state = {"net": net, "optim": optim}
    return run


def resumes(run, checkpoint):
    """Whether a checkpoint is accepted; then it is loaded, and each optimizer takes a step."""
    try:
        check_fits(checkpoint, run.folder.checkpoint, run.config)
        run._restore(copy.deepcopy(checkpoint))
    except UserError:
        return False
    for part in run.state.values():
        if isinstance(part, torch.optim.Optimizer):
            for group in part.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            part.step()
    return True


@pytest.mark.parametrize("stage", STAGES)
def test_spoilt_checkpoints_are_refused_or_harmless(stage, copied):
    run, chance = built(stage, copied[stage]), random.Random(0)
    good = load_checkpoint(copied[stage] / "checkpoint.pt")
    assert resumes(run, good)
    n_accepted = sum(resumes(run, spoilt(good, chance)) for _ in range(600))
    for part in ("within", "results", "random", "keeps"):
        n_accepted += sum(resumes(run, good | {part: spoilt(good[part], chance)}) for _ in range(200))
    assert n_accepted < 600  # settings of optimizers, which are not read, and of the generator of another device


SPOILS = {
    "a buffer of one number": lambda state: buffers(state, lambda buffer: torch.zeros(1)),
    "an empty buffer": lambda state: buffers(state, lambda buffer: torch.zeros(0)),
    "a buffer of stride 0": lambda state: buffers(state, lambda buffer: torch.zeros(1).expand(buffer.shape[::-1])),
    "a buffer of another dtype": lambda state: buffers(state, lambda buffer: buffer.double()),
    "a negative epoch": lambda state: state.update(epoch=-1),
    "a step beyond TensorBoard's": lambda state: state.update(step=2**70),
    "a tensor for a string": lambda state: state["config"].update(dataset=torch.zeros(3)),
    "no history": lambda state: state["results"].pop("history", None) or state["results"].pop("mean"),
    "a billion layers": lambda state: state["config"].update(layers=10**9),
    "a string of 10 MB": lambda state: state["config"].update(name="x" * 10**7),
    "odd generators": lambda state: state["random"].update(numpy=["MT19937", [0] * 624, 10**6, 0, 0.0]),
    "no weights": lambda state: state.update(keeps={}),
    "a weight of another shape": lambda state: state["keeps"]["net"].update({"stem.0.weight": torch.zeros(1)}),
    "a weight that is no tensor": lambda state: state["keeps"]["net"].update({"stem.0.weight": "x"}),
    "a weight too many": lambda state: state["keeps"]["net"].update(odd=torch.zeros(1)),
    "a number": lambda state: 7,
    "references to references": lambda state: state["results"].update(data=nested()),
}


def nested():
    """A list of lists that would be 2 ** 60 long if it were written out."""
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    return value


def buffers(state, change):
    of_parameter = state["keeps"]["optim" if "optim" in state["keeps"] else "w_optim"]["state"]
    for entry in of_parameter.values():
        entry["momentum_buffer"] = change(entry["momentum_buffer"])


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_checkpoint_that_is_not_of_the_run_is_one_line_from_every_command(spoil, copied, tmp_path, capsys):
    for stage, folder in copied.items():
        state = load_checkpoint(folder / "checkpoint.pt")
        result = SPOILS[spoil](state)
        save_checkpoint(result if result == 7 else state, folder, is_best=True)
        refused(capsys, STAGES[stage][0], ["--resume", folder])
    if "buffer" in spoil:
        return  # the optimizer's state is for resuming only
    words = [word.format(tmp_path) for word in STAGES["augment"][1]]
    folder = copied["augment"]
    refused(capsys, augment.main, ["--evaluate", folder])
    refused(capsys, augment.main, [*words, "--init-checkpoint", folder])
    refused(capsys, export.main, [folder, "--output", tmp_path / "x.pt2"])
    assert command(visualize.main, [folder]) == 0
    assert "Not shown: " in (folder / "report.html").read_text()


def test_an_archive_that_would_expand_is_refused_before_it_is_loaded(copied, tmp_path, capsys):
    path = copied["augment"] / "best.pt"
    state = load_checkpoint(path)
    torch.save(state | {"more": torch.zeros(10**7)}, tmp_path / "large.pt")
    with zipfile.ZipFile(tmp_path / "large.pt") as large, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in large.namelist():
            small.writestr(name, large.read(name))
    assert path.stat().st_size < 10**6 < (tmp_path / "large.pt").stat().st_size
    refused(capsys, augment.main, ["--evaluate", path], "damaged")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_checkpoint_that_is_no_file_is_one_line(make, copied, capsys):
    path = copied["augment"] / "best.pt"
    path.unlink()
    make(path)
    refused(capsys, augment.main, ["--evaluate", path], "best.pt")
    refused(capsys, augment.main, ["--evaluate", copied["augment"]], "best.pt")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumed_through_the_gates_has_the_optimizers_it_had(stage, copied):
    run, good = built(stage, copied[stage]), load_checkpoint(copied[stage] / "checkpoint.pt")
    run._restore(copy.deepcopy(good))
    optimizers = {name: part for name, part in run.state.items() if isinstance(part, torch.optim.Optimizer)}
    for name, part in optimizers.items():
        saved, loaded = good["keeps"][name], part.state_dict()
        assert differences(saved["state"], loaded["state"]) == []
        for before, after in zip(saved["param_groups"], loaded["param_groups"]):
            scheduled = {"lr": 0} if "initial_lr" in before else {}  # which sets it, once it is there
            assert differences(before | scheduled, after | scheduled) == []


def test_forms_say_where_a_value_differs():
    form = {"a": [whole(0)], Optional("b"): frozenset({str, float}), "c": {str: int}}
    assert misfit({"a": [1, 2], "c": {}}, form) is None
    assert misfit({"a": (1,), "b": 0.5, "c": {"x": 1}}, form) is None
    assert misfit({"a": [1, -2], "c": {}}, form) == "a.1 is -2"
    assert misfit({"a": [True], "c": {}}, form) == "a.0 is True"
    assert misfit({"a": [], "b": 1, "c": {}}, form) == "b is 1"
    assert misfit({"a": []}, form) == "c is missing"
    assert misfit({"a": [], "c": {"x": 1, 7: 1}}, form) == "c.7 is unknown"
    assert misfit([], form, "it") == "it is list"


# Two at once, and what is left behind


@pytest.mark.process
def test_a_run_that_is_running_is_not_touched_by_another_command(tmp_path, capsys):
    words = [word.format(tmp_path) for word in STAGES["search"][1]] + ["--epochs", "1000000", "--workers", "1"]
    first = subprocess.Popen([sys.executable, ROOT / "search.py", *words], stdout=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "search/digits")
    while not folder.checkpoint.exists():
        assert first.poll() is None
    for more in (["--overwrite"], ["--auto-resume"], ["--resume", folder]):
        refused(
            capsys,
            search.main,
            more if "--resume" in more else [*words, *more],
            f"in use by 'process {first.pid} on ",
        )
    first.kill()  # whereupon the lock is gone, whatever becomes of the process that loads images
    first.wait()
    folder.lock()
    assert folder.lock_file.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.process
@pytest.mark.parametrize("end", ["finished", "failed"])
def test_a_folder_is_unlocked_when_a_run_leaves_it(end, tmp_path, monkeypatch):
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    if end == "failed":
        monkeypatch.setattr("search.train", None)
        with pytest.raises(TypeError):
            command(search.main, words)
    else:
        assert command(search.main, words) == 0
    code = f"from running.folder import RunFolder; RunFolder({str(tmp_path / 'search/digits')!r}).lock()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def replaceable(finished, tmp_path):
    """The words that overwrite a run, and its folder."""
    shutil.copytree(finished["search"], tmp_path / "search/digits")
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    return [*words, "--seed", "7", "--overwrite"], tmp_path / "search/digits"


def test_an_overwritten_run_is_kept_if_the_new_one_cannot_be_saved(replaceable, monkeypatch, capsys):
    words, path = replaceable
    before = outcome(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("running.run.save_checkpoint", "running.folder.write_json", "running.run.get_logger", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            refused(capsys, search.main, words, "No space left")
        assert differences(before, outcome(path)) == []
        assert os.listdir(path.parent) == ["digits"]


class Killed(BaseException):
    """The process ends at once: nothing of the program runs any more."""


@pytest.mark.parametrize("command_after", ["--overwrite", "--resume"])
@pytest.mark.parametrize(
    "place",
    [
        "pathlib.Path.mkdir",
        "running.folder.RunFolder.lock",
        "running.folder.write_temporary",
        "running.folder.write_json",
        "running.run.save_checkpoint",
        "running.folder.RunFolder.check_room",
        "running.folder.RunFolder.forget_replaced",
        "os.rmdir",
    ],
)
def test_a_kill_while_a_run_is_replaced_leaves_a_run_that_both_commands_go_on_with(
    command_after, place, replaceable, monkeypatch
):
    words, path = replaceable
    renamed = []

    def set_aside(old, new, rename=os.rename):
        rename(old, new)
        renamed.append(new)

    def killed(*args, **options):
        if renamed:
            raise Killed
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", set_aside)
        original = pkgutil.resolve_name(place)
        patch.setattr(place, killed)
        with pytest.raises(Killed):
            command(search.main, words)
    assert command(search.main, words if command_after == "--overwrite" else ["--resume", path]) == 0
    assert os.listdir(path.parent) == ["digits"]
    assert (path / "summary.json").is_file()


@pytest.mark.parametrize("what", ["renamed", "deleted", "replaced"])
def test_a_folder_that_goes_away_under_a_run_ends_it(what, tmp_path, monkeypatch, capsys):
    words = [word.format(tmp_path) for word in STAGES["search"][1]]
    path, begin_epoch = tmp_path / "search/digits", SearchCNN.begin_epoch

    def take_away(self, epoch, epochs):
        if epoch == 2:
            shutil.move(path, tmp_path / "moved")
            if what == "deleted":
                shutil.rmtree(tmp_path / "moved")
            if what == "replaced":
                path.mkdir()

    monkeypatch.setattr(SearchCNN, "begin_epoch", take_away)
    refused(capsys, search.main, words, str(path), "renamed, deleted or replaced")
    assert not path.exists() or os.listdir(path) == []
    monkeypatch.setattr(SearchCNN, "begin_epoch", begin_epoch)
    if what == "renamed":
        assert command(search.main, ["--resume", tmp_path / "moved"]) == 0


# Crowded machines


class Pixels(list):
    """A source of images of which one ends the process that loads it."""

    def __getitem__(self, i):
        if self.end is not None and i == 5:
            self.end()
        return torch.zeros(1, 8, 8), 0


def no_memory():
    os.kill(os.getpid(), 9)


def no_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(("end", "remedy"), [(no_memory, "--workers"), (no_shared_memory, "--shm-size")])
def test_a_failing_loading_process_says_what_to_lower(end, remedy):
    pixels = Pixels(range(8))
    pixels.end = end
    loader = Loader(Images(pixels, [0] * 8, lambda x: x, None, 0), range(8), 4, torch.device("cpu"), workers=1)
    with pytest.raises(LoadingError, match=remedy):
        list(loader.epoch(1))


def test_too_many_open_files_says_what_to_raise(monkeypatch):
    pixels = Pixels(range(8))
    pixels.end = None
    loader = Loader(Images(pixels, [0] * 8, lambda x: x, None, 0), range(8), 4, torch.device("cpu"), workers=1)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (10, 10))
    with pytest.raises(LoadingError, match=r"ulimit -n .*--workers"):
        list(loader.epoch(1))


def test_the_steps_before_a_failing_loading_process_are_saved(tmp_path, monkeypatch, capsys):
    words = [word.format(tmp_path) for word in STAGES["augment"][1]]
    assert command(augment.main, [*words, "--name", "alone"]) == 0
    epoch_of = Loader.epoch

    def failing(self, epoch, first=0):
        for i, batch in enumerate(epoch_of(self, epoch, first)):
            if (epoch, i) == (2, 3):
                raise LoadingError("a process that loads images has failed")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", failing)
        refused(capsys, augment.main, words, "has failed")
    run = tmp_path / "augment/digits"
    assert load_checkpoint(run / "checkpoint.pt")["within"]["batches"] == 3
    assert command(augment.main, ["--resume", run]) == 0
    assert differences(outcome(tmp_path / "augment/alone"), outcome(run)) == []


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29999",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": None},
        {"RANK": "x"},
        {"RANK": "2"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "1"},
        {"MASTER_PORT": "x"},
        {"MASTER_PORT": "70000"},
        {"MASTER_ADDR": None},
        {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"},
    ],
)
def test_variables_that_torchrun_did_not_set_are_one_line(changes, monkeypatch):
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", ranks.timedelta(seconds=1))
    with pytest.raises(UserError, match=r"TORCHELASTIC_RUN_ID|no connection"), ranks.group():
        pass
    assert not torch.distributed.is_initialized()


@pytest.mark.process
def test_an_interrupt_while_torch_is_imported_leaves_no_traceback():
    code = (  # sets the handler first, since a job in the background ignores interrupts
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import running.errors as errors; errors.end_silently_on_interrupt(); os.kill(os.getpid(), signal.SIGINT)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (-2, "")


def test_a_long_message_is_cut_and_odd_characters_are_escaped(capsys):
    with pytest.raises(SystemExit), user_errors_in_one_line("search.py"):
        raise UserError("x" * 10**7 + "\x1b[2J\ud800 end")
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 2000
    assert line.endswith(r"\x1b[2J\ud800 end")
