"""Runs whose data set changed, moved, or lacks what is not needed: the command line, run as processes."""

import json
import shutil

import pytest
from conftest import assert_one_line_error, run_script

from run.checkpoints import load_checkpoint
from trained.evaluation import evaluate, images_of, load_trained
from visualize import write_report

TINY = ("--layers", 3, "--init-channels", 2, "--batch-size", 8, "--workers", 0)
DATA = ("--dataset", "folder", "--image-size", 8, "--image-channels", 1)
SEARCH = ("search.py", *TINY, "--nodes", 1, "--order", "first", *DATA, "--epochs")
AUGMENT = ("augment.py", *TINY, "--genotype", "DARTS_V1", "--aux-weight", 0, *DATA, "--epochs")


def succeed(*words, cwd):
    process = run_script(*words, cwd=cwd)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.process
def test_a_search_is_not_resumed_on_other_images(image_folder, tmp_path):
    images, run = image_folder(), tmp_path / "runs/search/folder"
    log = succeed(*SEARCH, 1, "--data-path", images, cwd=tmp_path)
    assert "images of each class: left 12, right 12" in log
    shutil.copy(images / "train/left/000.png", images / "train/left/new.png")
    resumed = run_script("search.py", "--resume", run, "--epochs", 2, cwd=tmp_path)
    assert_one_line_error(resumed, "training images", "left 12 -> 13")
    (images / "train/left/new.png").unlink()
    succeed("search.py", "--resume", run, "--epochs", 2, cwd=tmp_path)


@pytest.mark.process
def test_renamed_classes_stop_training_evaluation_and_report(image_folder, tmp_path):
    images, run = image_folder(), tmp_path / "runs/augment/folder"
    log = succeed(*AUGMENT, 1, "--data-path", images, cwd=tmp_path)
    assert "images of each class: left 12, right 12" in log
    for split in ("train", "val"):
        (images / split / "left").rename(images / split / "zzz")
    for words in (("--resume", run, "--epochs", 2), ("--evaluate", run)):
        process = run_script("augment.py", *words, cwd=tmp_path)
        assert_one_line_error(process, "left 12 -> 0, zzz 0 -> 12")
    write_report([run], None)
    assert "the test images are no longer those of the run" in (run / "report.html").read_text()


@pytest.mark.process
def test_data_that_moved_is_found_by_data_path(image_folder, tmp_path):
    images, run = image_folder(), tmp_path / "runs/augment/folder"
    succeed(*AUGMENT, 1, "--data-path", images, "--resize", "squeeze", "--augmentation", "affine", cwd=tmp_path)
    moved = images.rename(tmp_path / "moved")
    assert_one_line_error(run_script("augment.py", "--resume", run, "--epochs", 2, cwd=tmp_path), "does not exist")
    succeed("augment.py", "--resume", run, "--epochs", 2, "--data-path", moved, cwd=tmp_path)
    options = json.loads((run / "config.json").read_text())
    assert options["data_path"] == str(moved)  # where it resumes from now on
    assert (options["resize"], options["augmentation"]) == ("squeeze", "affine")
    top1 = load_checkpoint(run / "checkpoint.pt")["results"]["top1"]
    shutil.rmtree(moved / "train")  # which is not evaluated on
    line = succeed("augment.py", "--evaluate", run / "checkpoint.pt", cwd=tmp_path).splitlines()[0]
    assert f"top 1 {top1:.2%} of 24 test images" in line
    test_images, name = images_of(load_trained(run), moved)  # on which export.py checks a file
    assert (name, len(test_images), test_images.source.resize) == ("test", 24, "squeeze")
    moved = moved.rename(tmp_path / "again")
    (run / "config.json").write_text(json.dumps(options | {"data_path": str(moved)}))  # as if resumed once more
    write_report([run], tmp_path / "report.html")
    assert "Not shown" not in (tmp_path / "report.html").read_text()
    (moved / "val/left/000.png").unlink()
    assert "of 23 other images" in evaluate(run, moved, device="cpu").describe()
