"""Trained networks: their accuracy without training, and training that starts from them."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from short_runs import command, refused

import augment
from command_line.errors import UserError
from genotypes import DARTS_V1, DARTS_V2
from images.loading import Loader
from models.augment_cnn import AugmentCNN
from run.checkpoints import load_checkpoint, save_checkpoint
from trained.evaluation import accuracy_by_class, confusion_of, evaluate, initial_tensors, load_trained

TINY = ("--layers", 3, "--init-channels", 4, "--workers", 0, "--device", "cpu", "--genotype", "DARTS_V1")


@pytest.fixture(scope="module")
def run(short_runs, tmp_path_factory):
    """The folder of a run on digits."""
    path = tmp_path_factory.mktemp("evaluation")
    assert command(augment.main, [*TINY, "--batch-size", 16, "--epochs", 5, "--runs-path", path]) == 0
    return path / "augment/digits"


def printed(capsys, *words):
    capsys.readouterr()
    assert command(augment.main, words) == 0
    return capsys.readouterr().out


def test_evaluate_prints_the_accuracy_of_the_last_epoch_and_trains_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    summary = json.loads((run / "summary.json").read_text())
    lines = printed(capsys, "--evaluate", run)
    assert lines.startswith(f"{run}/checkpoint.pt: top 1 {summary['test_top1']:.2%} of 200 test images\n")
    best = printed(capsys, "--evaluate", run / "best.pt")
    assert f"chosen for its accuracy on the test images: top 1 {summary['best_test_top1']:.2%} of 200" in best
    hits = [float(share) * int(n) / 100 for share, n in re.findall(r"([\d.]+)% of +(\d+)  \d", lines)]
    assert len(hits) == 10
    assert sum(hits) == pytest.approx(200 * summary["test_top1"], abs=0.3)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert printed(capsys, "--evaluate", run, "--mirror") != lines
    log = (run / "log.txt").read_text()  # at the end of the training too
    assert all(f"  {line}\n" in log for line in lines.splitlines()[1:])


def test_accuracies_by_class_and_their_mean():
    lines = accuracy_by_class(np.array([[95, 0, 0], [5, 0, 0], [0, 0, 0]]), ["many", "few", "none"])
    assert lines == [
        " 100.00% of    95  many",
        "   0.00% of     5  few",
        "   0.00% of     0  none",
        "  50.00% is the mean over classes",
    ]


def test_the_confusion_of_a_network_is_that_of_its_evaluation(run):
    evaluation = evaluate(run)
    net = evaluation.trained.new_network()
    net.load_state_dict(evaluation.trained.tensors)
    loader = Loader(evaluation.images, range(200), 100, torch.device("cpu"), shuffle=False)
    assert (confusion_of(net, loader, 10) == evaluation.confusion()).all()


def test_what_cannot_be_evaluated_is_one_line(run, tmp_path, capsys):
    refused(capsys, augment.main, ["--evaluate", tmp_path / "x"], "does not exist")
    (tmp_path / "x").write_bytes(b"x")
    refused(capsys, augment.main, ["--evaluate", tmp_path / "x"], str(tmp_path / "x"))
    save_checkpoint({"stage": "search"}, tmp_path)
    refused(capsys, augment.main, ["--evaluate", tmp_path / "checkpoint.pt"], "not a checkpoint of augment.py")
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    checkpoint["parts"]["net"]["linear.bias"] = torch.zeros(1)
    save_checkpoint(checkpoint, tmp_path)
    refused(capsys, augment.main, ["--evaluate", tmp_path / "checkpoint.pt"], "linear.bias")


def test_other_images_of_the_same_classes_and_images_without_classes(image_folder, tmp_path, capsys, monkeypatch):
    data = ("--dataset", "folder", "--image-size", 8, "--data-path", image_folder(tmp_path / "a", n=4, size=8))
    words = (*TINY, *data, "--batch-size", 4, "--epochs", 1, "--runs-path", tmp_path, "--hold-out", 0.5)
    assert command(augment.main, words) == 0
    other = image_folder(tmp_path / "data", splits=("val",), n=7, size=30)
    monkeypatch.chdir(tmp_path)
    lines = printed(capsys, "--evaluate", tmp_path / "augment/folder", "--data-path", "data")
    top1 = float(re.search(r"top 1 ([\d.]+)% of 14 other images", lines)[1]) / 100
    (other / "val/notes.txt").write_text("not an image")
    shutil.copytree(other / "val/left", other / "val/.hidden")
    table = printed(capsys, "--evaluate", tmp_path / "augment/folder", "--predict", other)
    rows = list(csv.DictReader(table.splitlines()))
    assert [row["path"] for row in rows] == sorted(map(str, other.glob("val/[!.]*/*.png")))
    assert sum(row["class"] in row["path"] for row in rows) / 14 == pytest.approx(top1, abs=1e-4)
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    (other / "val/notes.txt").unlink()
    (other / "val/left").rename(other / "val/zzz")
    refused(capsys, augment.main, ["--evaluate", tmp_path / "augment/folder", "--data-path", other], "right, zzz")
    refused(capsys, augment.main, ["--evaluate", "augment/folder", "--predict", "c"], "no such folder")


# Training that starts from a trained network


def new_network(genotype=DARTS_V1, n_classes=10, C=4):
    torch.manual_seed(1)
    return AugmentCNN(8, 1, C, n_classes, 3, True, genotype)


@pytest.mark.parametrize("classes", [list("0123456789"), list("1023456789"), ["a", "b"]])
def test_training_starts_from_all_weights_but_from_classifiers_of_the_same_classes_only(classes, run):
    trained, net = load_trained(run), new_network(n_classes=len(classes))
    tensors, words = initial_tensors(run, net, DARTS_V1, classes)
    is_same = classes == trained.results["classes"]
    for name, tensor in trained.tensors.items():
        if "linear" in name and not is_same:
            assert name not in tensors
        else:
            assert torch.equal(tensors[name], tensor)
    assert ("linear.weight" in words) == (not is_same)


@pytest.mark.parametrize(
    ("net", "genotype", "reason"),
    [(new_network(C=6), DARTS_V1, "shape"), (new_network(DARTS_V2), DARTS_V2, "its genotype is another")],
)
def test_training_does_not_start_from_another_network(net, genotype, reason, run):
    with pytest.raises(UserError, match=reason):
        initial_tensors(run, net, genotype, list("0123456789"))


def test_training_starts_from_what_fits_of_another_programs_state_dict(run, tmp_path, capsys):
    tensors = load_trained(run).tensors
    other = {f"module.{name}": tensor + 1 for name, tensor in tensors.items()}
    other |= {"module.linear.weight": torch.zeros(3, 3), "unknown": torch.zeros(1)}
    torch.save({"epoch": 7, "state_dict": other}, tmp_path / "other.pth")
    taken, words = initial_tensors(tmp_path / "other.pth", new_network(), DARTS_V1, ["a"] * 10)
    assert taken.keys() == tensors.keys() - {"linear.weight"}
    assert torch.equal(taken["linear.bias"], tensors["linear.bias"] + 1)
    assert words.startswith(f"{len(tensors) - 1} of {len(tensors)} tensors are from {tmp_path}/other.pth")
    assert "not in it: linear.weight; not taken from it: linear.weight, unknown" in words
    words = (*TINY, "--batch-size", 128, "--epochs", 1, "--runs-path", tmp_path, "--init-checkpoint")
    assert "not taken from it: linear.weight, unknown" in printed(capsys, *words, tmp_path / "other.pth")
    torch.save({"unknown": torch.zeros(1)}, tmp_path / "none.pth")
    refused(capsys, augment.main, [*words, tmp_path / "none.pth", "--overwrite"], "no tensor whose name and shape")


def test_a_training_on_other_classes_starts_from_the_weights(run, image_folder, tmp_path):
    data = ("--dataset", "folder", "--data-path", image_folder(size=8), "--image-size", 8, "--image-channels", 1)
    words = (*TINY, *data, "--batch-size", 8, "--epochs", 1, "--lr", 1e-9, "--weight-decay", 0)
    assert command(augment.main, [*words, "--runs-path", tmp_path, "--init-checkpoint", run]) == 0
    tuned = load_trained(tmp_path / "augment/folder").tensors
    assert tuned["linear.weight"].shape[0] == 2
    for name, tensor in load_trained(run).tensors.items():
        if name.endswith(("weight", "bias")) and "linear" not in name:  # at this learning rate they stay
            assert torch.allclose(tuned[name], tensor, atol=1e-6), name
