"""A run's options, history and scalars may come from a stranger: they are checked like typed ones, or refused."""

import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from gates import STAGES, command, refused
from torch import nn

import genotypes
import protocol
import search
import visualize
from command_line.errors import UserError
from config import SearchConfig
from genotypes import DARTS_V2
from machine.memory import check_memory, machine_memory
from models.augment_cnn import AugmentCNN
from models.search_cnn import SearchCNN
from report.recorded_run import read_run

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", "[" * 10**5, '{"epochs": ' + "9" * 10**4 + "}", "\xff"])
def test_odd_json_is_one_line(text, copied, capsys):
    for name in ("config.json", "history.json", "summary.json"):
        path = copied["search"] / name
        before = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        if text not in ("null", "[]"):
            refused(capsys, visualize.main, [copied["search"], copied["search"]])
        if name == "config.json":
            refused(capsys, search.main, ["--resume", copied["search"]], "config.json")
        path.write_bytes(before)


def test_a_run_whose_name_looks_like_a_files_is_reported(copied):
    folder = copied["search"].rename(copied["search"].with_name("results.json"))
    assert command(visualize.main, [folder]) == 0
    assert (folder / "report.html").is_file()


# Options that no machine has the memory for

ABSURD = {
    "layers": 10**9,
    "init-channels": 10**9,
    "nodes": 10**9,
    "workers": 10**5,
    "batch-size": 10**12,
    "image-size": 10**9,
}


@pytest.mark.parametrize("option", ABSURD)
@pytest.mark.parametrize("stage", STAGES)
def test_absurd_options_are_one_line_before_anything_is_built_or_written(option, stage, copied, tmp_path, capsys):
    if option == "nodes" and stage == "augment":
        return
    main, words = STAGES[stage]
    words = [word.format(tmp_path / "new") for word in words]
    refused(capsys, main, [*words, f"--{option}", ABSURD[option]], option)
    assert not (tmp_path / "new").exists()
    path = copied[stage] / "config.json"
    (copied[stage] / "checkpoint.pt").unlink()  # which would be of another network
    (copied[stage] / "previous.pt").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {option.replace("-", "_"): ABSURD[option]}))
    refused(capsys, main, ["--resume", copied[stage]], option)


def test_a_batch_that_no_memory_holds_is_refused_and_a_large_one_is_not(tmp_path, monkeypatch, capsys):
    main, words = STAGES["search"]
    words = [word.format(tmp_path) for word in [*words, "--batch-size", "2000000000", "--epochs", "1"]]
    assert command(main, words) == 0  # all images of the digits in a batch
    monkeypatch.setattr("machine.memory.OBJECTS", 0)
    monkeypatch.setattr("machine.memory.machine_memory", lambda: 10**5)
    refused(capsys, main, [*words, "--overwrite"], "--batch-size")


def test_the_least_memory_of_a_network_is_less_than_it_has(monkeypatch):
    """By a factor that leaves room for other networks, and not by so much that absurd ones would pass."""
    net = SearchCNN(3, 32, 10, 8, None)
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    config = SearchConfig(["--init-channels", "32", "--workers", "0"])
    monkeypatch.setattr("machine.memory.machine_memory", lambda: 0)
    with pytest.raises(UserError, match="--init-channels") as caught:
        check_memory(config, 14 * 8)
    least = float(re.search(r"at least (\S+) GB", str(caught.value))[1]) * 1e9
    assert weights / 4 < least < weights + 10e3 * 8 * 14 * 8


NETWORKS = {  # what makes a network, operations in a cell, pixels a side, and what the stem leaves of them
    "search": (lambda: SearchCNN(3, 8, 10, 5, nn.CrossEntropyLoss()), 14 * 8, 16, 16),
    "augment": (lambda: AugmentCNN(32, 3, 12, 10, 6, False, DARTS_V2), 8, 32, 32),
    "augment, imagenet": (lambda: AugmentCNN(128, 3, 12, 10, 6, False, DARTS_V2, stem="imagenet"), 8, 128, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_least_memory_of_a_step_is_less_than_what_a_backward_pass_needs(name, monkeypatch):
    build, n_ops, pixels, size = NETWORKS[name]
    torch.manual_seed(0)
    net, images, saved = build().train(), torch.randn(4, 3, pixels, pixels), {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = net(images.to(memory_format=torch.channels_last))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
    layers, C = (5, 8) if name == "search" else (6, 12)
    monkeypatch.setattr("machine.memory.OBJECTS", 0)
    monkeypatch.setattr("machine.memory.machine_memory", lambda: 0)
    config = SimpleNamespace(layers=layers, init_channels=C)
    with pytest.raises(UserError, match="--batch-size") as caught:
        check_memory(config, n_ops, size, images=10**6)
    least = float(re.search(r"at least (\S+) GB", str(caught.value))[1]) * 1e9 / 10**6 * len(images)
    assert output is not None
    assert 0 < least < sum(saved.values()) - weights


def test_a_container_has_the_memory_that_it_may_use(tmp_path, monkeypatch):
    whole = machine_memory()
    for text, memory in (("max\n", whole), ("1000000\n", 10**6), ("odd", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr("machine.memory.LIMIT", tmp_path / "memory.max")
        assert machine_memory() == memory


def test_absurdly_many_random_cells_are_one_line(capsys):
    refused(capsys, genotypes.main, ["--random", "1000000000"], "--random")
    refused(capsys, protocol.main, ["--random", "1000000000"], "--random")


# A report


def reports(folder, render):
    """Whether a run's folder can be read for a report; `render`: then write the report too, which takes a second."""
    try:
        read_run(folder)
    except UserError:
        return False
    return command(visualize.main, [folder]) == 0 if render else True


def test_a_run_without_tensorboards_files_has_nothing_to_show(copied, capsys):
    shutil.rmtree(copied["search"] / "tb")
    refused(capsys, visualize.main, [copied["search"]], "no epoch is over")


@pytest.mark.long
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
