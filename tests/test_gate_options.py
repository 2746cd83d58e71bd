"""A run's options, history and scalars may come from a stranger: they are checked like typed ones, or refused."""

import json
import random
import shutil

import pytest
from gates import ODD_VALUES, STAGES, command, refused, spoilt

import search
import visualize
from config import AugmentConfig, SearchConfig
from report.story import read
from running.errors import UserError

pytestmark = pytest.mark.usefixtures("short_runs")

OF_THE_COMMAND = {
    "overwrite": True,
    "gpus": "all",
    "auto_resume": True,
    "resume": "/",
    "evaluate": "x",
    "mirror": True,
    "help": True,
}


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
