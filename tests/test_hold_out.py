"""--hold-out F of augment.py: accuracy on a part of the training images, without the test images."""

import json
import random
import shutil
from collections import Counter

import pytest
from short_runs import command, refused

import augment
from images.data_sets import DATASETS, hold_out_of_training
from trained.evaluation import evaluate
from utils import get_data

SMALL = ("--layers", 3, "--init-channels", 2, "--epochs", 1, "--workers", 0, "--device", "cpu")
AUGMENT = (*SMALL, "--genotype", "DARTS_V2")


class Named(list):
    """Images of these names; the image itself is its name."""

    @property
    def names(self):
        return list(self)

    def subset(self, indices):
        return Named(self[i] for i in indices)


def split(names, labels, fraction):
    source, _, held_out, held_out_labels = hold_out_of_training(Named(names), labels, fraction)
    return set(source), dict(zip(held_out, held_out_labels))


def names_of(counts):
    """(names, labels) of so many images of each class."""
    pairs = [(f"{label}/{i:04d}.png", label) for label, count in enumerate(counts) for i in range(count)]
    return [name for name, _ in pairs], [label for _, label in pairs]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_of_each_class_the_same_fraction_is_held_out(fraction):
    counts = [2, 10, 101, 400]
    names, labels = names_of(counts)
    kept, held_out = split(names, labels, fraction)
    assert not kept & set(held_out)
    assert kept | set(held_out) == set(names)
    for label, n in Counter(held_out.values()).items():
        assert n == min(max(round(fraction * counts[label]), 1), counts[label] - 1)
    assert len(set(held_out.values())) == len(counts)


def test_which_images_are_held_out_depends_on_their_names_and_one_that_is_added_moves_at_most_one_other():
    names, labels = names_of([40, 60])
    _, before = split(names, labels, 0.2)
    order = random.Random(0).sample(range(100), 100)
    assert split([names[i] for i in order], [labels[i] for i in order], 0.2)[1] == before
    for i in range(30):
        _, after = split([*names, f"0/added{i}.png"], [*labels, 0], 0.2)
        assert len(set(before) - set(after)) <= 1
        assert len(set(after) - set(before)) <= 1


def test_held_out_images_are_training_images_without_augmentation():
    _, _, _, training = get_data("digits", "data", 0, validation=False)
    _, _, n_classes, rest, held_out = get_data("digits", "data", 4, validation=True, hold_out=0.1)
    assert len(rest) + len(held_out) == len(training)
    assert n_classes == 10
    pixels = {training.source[i][0].tobytes() for i in range(len(training))}
    assert {held_out.source[i][0].tobytes() for i in range(len(held_out))} <= pixels
    assert held_out.transform is rest.plain_transform
    assert DATASETS["digits"].mean_std is None
    assert rest.normalisation() != training.normalisation()  # computed without the held-out images


def test_a_folder_without_val_holds_out_a_fifth_that_images_which_are_added_do_not_change(image_folder):
    root = image_folder(splits=("train",), n=100)
    *_, train, test = get_data("folder", root, 0, True, image_size=8)
    assert not set(train.source.names) & set(test.source.names)
    assert abs(len(test) / 200 - 0.2) < 0.08  # three standard deviations
    for i in range(50):
        shutil.copy(root / "train/left/000.png", root / f"train/left/new{i}.png")
    *_, after = get_data("folder", root, 0, True, image_size=8)
    assert [name for name in after.source.names if "new" not in name] == test.source.names


def test_each_class_of_a_folder_without_val_has_training_and_test_images(image_folder):
    classes = [str(i) for i in range(40)]
    root = image_folder(splits=("train",), classes=classes, n=2, size=8)
    *_, train, test = get_data("folder", root, 0, True, image_size=8)
    assert set(train.class_counts().values()) == set(test.class_counts().values()) == {1}


@pytest.mark.long
def test_test_images_are_not_opened(image_folder, short_runs, tmp_path, capsys):
    root = image_folder()
    words = (
        "--dataset",
        "folder",
        "--data-path",
        root,
        "--image-size",
        12,
        *AUGMENT,
        "--runs-path",
        tmp_path,
        "--name",
    )
    assert command(augment.main, [*words, "before", "--hold-out", 0.25]) == 0
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"poison")
    assert command(augment.main, [*words, "after", "--hold-out", 0.25]) == 0
    before, after = (
        json.loads((tmp_path / f"augment/{name}/summary.json").read_text()) for name in ("before", "after")
    )
    assert before["held_out_top1"] == after["held_out_top1"]
    assert "test_top1" not in before
    refused(capsys, augment.main, [*words, "test"], "cannot read the image")  # where they are measured, it is met

    evaluation = evaluate(tmp_path / "augment/before", root)  # of the same images as in training
    assert (evaluation.trained.measured_on, len(evaluation.images)) == ("held-out", 6)
    assert evaluation.top1 == pytest.approx(before["held_out_top1"], abs=1e-6)
