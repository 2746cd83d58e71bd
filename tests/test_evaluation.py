"""Trained networks: their accuracy without training, and training that starts from them."""

import json
import re

import pytest
import torch
from conftest import assert_one_line_error, run_script

from command_line.errors import UserError
from genotypes import DARTS_V1, DARTS_V2
from models.augment_cnn import AugmentCNN
from run.checkpoints import load_checkpoint, save_checkpoint
from trained.evaluation import load_trained, start_from

pytestmark = pytest.mark.process

TINY = ("--layers", 3, "--init-channels", 4, "--batch-size", 128, "--workers", 0)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with a trained network in it."""
    cwd = tmp_path_factory.mktemp("evaluation")
    process = run_script("augment.py", *TINY, "--epochs", 3, "--genotype", "DARTS_V1", cwd=cwd)
    assert process.returncode == 0, process.stderr
    return cwd


def test_evaluate_prints_the_accuracy_of_the_run_and_trains_nothing(cwd):
    run = cwd / "runs/augment/digits"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    summary = json.loads((run / "summary.json").read_text())
    for path, top1 in ((run, "best_test_top1"), (run / "checkpoint.pt", "test_top1")):
        process = run_script("augment.py", "--evaluate", path, cwd=cwd)
        assert process.returncode == 0, process.stderr
        assert f"top 1 {summary[top1]:.2%} of 360 test images" in process.stdout
    hits = [float(share) * int(n) / 100 for share, n in re.findall(r"([\d.]+)% of +(\d+)  \d", process.stdout)]
    assert len(hits) == 10
    assert sum(hits) == pytest.approx(360 * summary["test_top1"], abs=0.3)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run_script("augment.py", "--evaluate", run, "--mirror", cwd=cwd).stdout != process.stdout


def test_what_cannot_be_evaluated_is_one_line(cwd, tmp_path):
    assert_one_line_error(run_script("augment.py", "--evaluate", tmp_path / "x", cwd=cwd), "does not exist")
    (tmp_path / "x").write_bytes(b"x")
    assert_one_line_error(run_script("augment.py", "--evaluate", tmp_path / "x", cwd=cwd), "damaged")
    save_checkpoint({"stage": "search"}, tmp_path)
    assert_one_line_error(run_script("augment.py", "--evaluate", tmp_path / "checkpoint.pt", cwd=cwd), "augment.py")


def test_fine_tuning_starts_from_the_weights_on_data_of_other_classes(cwd, image_folder):
    trained = cwd / "runs/augment/digits"
    data = ("--dataset", "folder", "--data-path", image_folder(size=8), "--image-size", 8, "--image-channels", 1)
    words = (*TINY[:4], "--batch-size", 8, "--epochs", 1, "--genotype", "DARTS_V1", "--lr", 1e-9, "--weight-decay", 0)
    process = run_script("augment.py", *data, *words, "--init-checkpoint", trained, cwd=cwd)
    assert process.returncode == 0, process.stderr
    tuned = load_checkpoint(cwd / "runs/augment/folder/checkpoint.pt")["parts"]["net"]
    for name, tensor in load_checkpoint(trained / "best.pt")["parts"]["net"].items():
        if name.endswith("linear.weight"):
            assert tuned[name].shape[0] == 2
        elif name.endswith(("weight", "bias")) and "linear" not in name:  # at this learning rate they stay
            assert torch.allclose(tuned[name], tensor, atol=1e-6), name
    other = (*data, *words, "--name", "other", "--init-checkpoint", trained, "--init-channels", 6)
    assert_one_line_error(run_script("augment.py", *other, cwd=cwd), "another network")
    # the same weights in other places: a skip connection has none
    genotype = str(DARTS_V1).replace("('skip_connect', 2)", "('skip_connect', 3)", 1)
    swapped = (*data, *TINY, "--epochs", 1, "--genotype", genotype, "--name", "swapped", "--init-checkpoint", trained)
    assert_one_line_error(run_script("augment.py", *swapped, cwd=cwd), "its genotype is another")
    assert not (cwd / "runs/augment/swapped").exists()


def test_weights_are_loaded_whole_or_not_at_all(cwd):
    trained = load_trained(cwd / "runs/augment/digits")
    net = AugmentCNN(8, 1, 4, 10, 3, True, DARTS_V1)
    start_from(net, trained, trained.results["classes"])
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in trained.tensors.items())
    other = AugmentCNN(8, 1, 4, 10, 3, True, DARTS_V2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="another network"):
        start_from(other, trained, trained.results["classes"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("linear.bias"),
        lambda tensors: tensors.update(another=torch.zeros(1)),
        lambda tensors: tensors.update({"linear.bias": torch.zeros(1)}),
        lambda tensors: tensors.update({"linear.bias": torch.zeros(10, dtype=torch.float64)}),
        lambda tensors: tensors.update({"linear.bias": "text"}),
    ],
)
def test_tensors_must_have_the_names_shapes_and_types_of_the_networks(change, cwd, tmp_path):
    checkpoint = load_checkpoint(cwd / "runs/augment/digits/best.pt")
    change(checkpoint["parts"]["net"])
    save_checkpoint(checkpoint, tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\.pt"):
        load_trained(tmp_path / "checkpoint.pt")
