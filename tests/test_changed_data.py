"""Runs whose data set changed, moved, or lacks what is not needed."""

import json
import shutil

import pytest
from short_runs import command, refused

import augment
import search
from run.checkpoints import load_checkpoint
from trained.evaluation import evaluate, images_of, load_trained
from visualize import write_report

pytestmark = [pytest.mark.usefixtures("short_runs"), pytest.mark.long]
TINY = ("--layers", 3, "--init-channels", 2, "--batch-size", 8, "--workers", 0, "--device", "cpu")
DATA = ("--dataset", "folder", "--image-size", 8, "--image-channels", 1)


@pytest.fixture
def begin(image_folder, tmp_path):
    """A function that trains for an epoch: (the images, the run's folder)."""

    def begin(main, *words):
        images = image_folder()
        assert command(main, [*TINY, *DATA, *words, "--epochs", 1, "--data-path", images, "--runs-path", tmp_path]) == 0
        return images, next(path.parent for path in tmp_path.rglob("config.json"))

    return begin


def test_a_search_is_not_resumed_on_other_images(begin, capsys):
    images, run = begin(search.main, "--nodes", 1, "--order", "first")
    shutil.copy(images / "train/left/000.png", images / "train/left/new.png")
    refused(capsys, search.main, ["--resume", run, "--epochs", 2], "training images", "left 12 -> 13")
    (images / "train/left/new.png").unlink()
    assert command(search.main, ["--resume", run, "--epochs", 2]) == 0


def test_renamed_classes_stop_training_evaluation_and_report(begin, capsys):
    images, run = begin(augment.main, "--genotype", "DARTS_V1")
    for split in ("train", "val"):
        (images / split / "left").rename(images / split / "zzz")
    for words in (("--resume", run, "--epochs", 2), ("--evaluate", run)):
        refused(capsys, augment.main, words, "left 12 -> 0, zzz 0 -> 12")
    write_report([run], None)
    assert "the test images are no longer those of the run" in (run / "report.html").read_text()


def test_data_that_moved_is_found_by_data_path(begin, tmp_path, capsys):
    images, run = begin(augment.main, "--genotype", "DARTS_V1", "--resize", "squeeze", "--augmentation", "affine")
    moved = images.rename(tmp_path / "moved")
    refused(capsys, augment.main, ["--resume", run, "--epochs", 2], "does not exist")
    assert command(augment.main, ["--resume", run, "--epochs", 2, "--data-path", moved]) == 0
    options = json.loads((run / "config.json").read_text())
    assert options["data_path"] == str(moved)  # where it resumes from now on
    assert (options["resize"], options["augmentation"]) == ("squeeze", "affine")
    top1 = load_checkpoint(run / "checkpoint.pt")["results"]["top1"]
    shutil.rmtree(moved / "train")  # which is not evaluated on
    assert f"top 1 {top1:.2%} of 24 test images" in evaluate(run, device="cpu").describe()
    test_images, name = images_of(load_trained(run), moved)  # on which export.py checks a file
    assert (name, len(test_images), test_images.source.resize) == ("test", 24, "squeeze")
    moved = moved.rename(tmp_path / "again")
    (run / "config.json").write_text(json.dumps(options | {"data_path": str(moved)}))  # as if resumed once more
    write_report([run], tmp_path / "report.html")
    assert "Not shown" not in (tmp_path / "report.html").read_text()
    (moved / "val/left/000.png").unlink()
    assert "of 23 other images" in evaluate(run, moved, device="cpu").describe()
