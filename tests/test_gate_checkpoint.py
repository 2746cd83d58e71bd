"""A checkpoint may come from a stranger: what is not refused in one line must be harmless."""

import copy
import os
import random
import zipfile

import pytest
import torch
from comparing import differences
from gates import STAGES, command, refused, spoilt

import augment
import export
import search
import visualize
from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from models.augment_cnn import AugmentCNN
from models.search_cnn import SearchCNN
from run.checkpoint_checks import check_fits
from run.checkpoints import load_checkpoint, save_checkpoint
from run.forms import Optional, misfit, whole
from run.run import Run

pytestmark = pytest.mark.usefixtures("short_runs")


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


@pytest.mark.long
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
    "an epoch without its steps": lambda state: state["within"].update(trained=True),
    "more steps than an epoch has": lambda state: state.update(
        within={**state["within"], "batches": 50, "meters": [METER] * 3}, step=state["step"] + 50
    ),
    "an average too large for a float": lambda state: state.update(
        within={**state["within"], "batches": 1, "meters": [METER | {"sum": 10**400}] * 3}, step=state["step"] + 1
    ),
    "references to references": lambda state: state["results"].update(data=nested()),
}


METER = {"val": 1.0, "avg": 1.0, "sum": 1.0, "count": 1}


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


@pytest.mark.long
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


def test_what_an_epoch_of_the_history_holds_besides_must_fit_json(copied, capsys):
    state = load_checkpoint(copied["search"] / "checkpoint.pt")
    state["results"]["history"][0]["note"] = torch.zeros(1)
    save_checkpoint(state, copied["search"])
    refused(capsys, search.main, ["--resume", copied["search"]], "note")


@pytest.mark.parametrize("spoil", ["weights", "std"])
def test_a_network_whose_outputs_are_not_finite_is_not_said_to_be_right_or_wrong(spoil, copied, tmp_path, capsys):
    state = load_checkpoint(copied["augment"] / "best.pt")
    if spoil == "weights":
        state["keeps"]["net"]["linear.weight"][:] = float("nan")
    else:
        state["results"]["std"] = [1e-320]  # zero in float32
    save_checkpoint(state, copied["augment"], is_best=True)
    refused(capsys, augment.main, ["--evaluate", copied["augment"]])
    refused(capsys, export.main, [copied["augment"], "--output", tmp_path / "x.pt2"])
    assert not (tmp_path / "x.pt2").exists()


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
