"""The registry of data sets, `DATASETS`, and how data sets are split.

To add a data set, add an entry to `DATASETS`; tests run on every entry. torch is imported only when a data set is
loaded, so that command lines are read without it.
"""

import functools
import hashlib
import math
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from command_line.errors import UserError, any_error_in_one_line
from images.image_folder import SYSTEM_NAMES, list_folder, listed, warn_once

HELD_OUT = 5  # if a data set has no test images, one in HELD_OUT images is held out as such
CONSTANT = 1e-6  # a channel with a smaller standard deviation, of pixels in [0, 1], is constant up to rounding
STATISTICS_IMAGES = 10_000  # mean and std are computed from at most so many training images, evenly spaced


@dataclass(frozen=True)
class Spec:
    """The description of a data set.

    load: a function (path, train, size, channels) -> (source, labels, n_classes), where source[i] is (PIL image, label)
    with `size` pixels a side and `channels` channels, and labels is a list of integers. It is called with `train`,
    `size` and `channels` as keyword arguments. augmentation: names of `preproc.AUGMENTATIONS`, joined by +; mean_std:
    (mean, std) of the pixels per channel, or None to compute them from the images.
    """

    load: Callable
    size: int
    channels: int
    augmentation: str
    mean_std: tuple | None = None


def load_torchvision(name, path, train, size, channels):
    """Load a data set of torchvision; download it if it is not in the folder `path`."""
    from torchvision import datasets

    split = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}

    def describe(error):
        reason = str(error) or type(error).__name__
        return (
            f"data set {name} in {Path(path).resolve()} cannot be read or downloaded ({reason}); if its files are "
            "damaged, delete them; without network there are --dataset digits, and --dataset folder --data-path DIR "
            "for images of your own"
        )

    with any_error_in_one_line(describe):
        source = getattr(datasets, name)(path, download=True, **split)
    labels = [int(label) for label in (source.labels if name == "SVHN" else source.targets)]
    return source, labels, max(labels) + 1


def load_digits(path, train, size, channels):
    """scikit-learn's 1,797 handwritten digits, which are part of the library. A fixed fifth of them is the test set."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = [Image.fromarray(image) for image in np.round(digits.images * (255 / 16)).astype(np.uint8)]
    labels = digits.target.tolist()
    test_indices, train_indices = stratified_split(labels, HELD_OUT, seed=0)
    return *subset(list(zip(images, labels)), labels, train_indices if train else test_indices), 10


def load_folder(path, train, size, channels, skip_bad_images=False, whole=False, resize="crop"):
    """Images in `path`/train/CLASS/ and `path`/val/CLASS/. Without val/, about a fifth of train/ is the test set.

    whole: leave the images as large as they are; resize, skip_bad_images: see `list_folder`. Without val/, the test
    images are those whose names have a hash in the lowest of `HELD_OUT` equal ranges: so an image that is added moves
    at most one other.
    """
    root = Path(path)
    has_val = (root / "val").is_dir()
    split = "val" if has_val and not train else "train"
    mode = {1: "L", 3: "RGB"}[channels]
    folder = list_folder(root / split, None if whole else size, mode, resize, skip_bad_images)
    others = {other.name for other in root.glob("[!.]*/")} - {"train", "val", *SYSTEM_NAMES}
    if others:
        without_val = "" if has_val else ", and without val/ a fifth of train/ is held out"
        warn_once(f"{root}: only train/ and val/ are read, not {listed(sorted(others))}{without_val}")
    if not has_val:
        lowest_range = (2**64 // HELD_OUT).to_bytes(8)
        in_test = held_out_by_name(folder.names, folder.labels, b"", lambda hashes: bisect_left(hashes, lowest_range))
        folder = folder.subset(np.flatnonzero(in_test != train).tolist())
    return folder, folder.labels, len(folder.classes)


def hold_out_of_training(source: Sequence, labels: list[int], fraction: float) -> tuple[Sequence, list, Sequence, list]:
    """Hold out a fraction of the training images: (training source, its labels, held-out source, its labels).

    Of each class with n images round(fraction * n) are held out, but at least one and not all. Which these are is
    decided by the images' names, or by their numbers if they are not files. Raises UserError if a class has one image.
    """
    names = getattr(source, "names", None) or list(map(str, range(len(labels))))
    # other hashes than those of `load_folder`, which leaves the larger ones for training
    held_out = held_out_by_name(names, labels, b"hold out\0", lambda hashes: round(fraction * len(hashes)))
    return *subset(source, labels, np.flatnonzero(~held_out)), *subset(source, labels, np.flatnonzero(held_out))


def held_out_by_name(names: list[str], labels: list[int], salt: bytes, number: Callable) -> np.ndarray:
    """Which images to hold out: of each class those whose names have the smallest hashes, a boolean array.

    salt: what is hashed before each name; number: a function from the sorted hashes of a class to how many images are
    held out; at least one is, and one is not. Raises UserError if a class has a single image.
    """
    hashes = [hashlib.sha256(salt + os.fsencode(name)).digest() for name in names]
    members = defaultdict(list)
    for i in sorted(range(len(names)), key=hashes.__getitem__):
        members[labels[i]].append(i)
    held_out = np.zeros(len(names), dtype=bool)
    for indices in members.values():
        if len(indices) == 1:
            raise UserError(f"{names[indices[0]]} is the only image of its class; to hold images out, each needs two")
        n = number([hashes[i] for i in indices])
        held_out[indices[: min(max(n, 1), len(indices) - 1)]] = True
    return held_out


DATASETS = {
    "digits": Spec(load_digits, 8, 1, "affine"),
    "cifar10": Spec(
        functools.partial(load_torchvision, "CIFAR10"),
        32,
        3,
        "crop+flip",
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": Spec(functools.partial(load_torchvision, "CIFAR100"), 32, 3, "crop+flip"),
    "svhn": Spec(functools.partial(load_torchvision, "SVHN"), 32, 3, "crop"),
    "mnist": Spec(functools.partial(load_torchvision, "MNIST"), 28, 1, "affine", ((0.1307,), (0.3081,))),
    "kmnist": Spec(functools.partial(load_torchvision, "KMNIST"), 28, 1, "affine"),
    "fashionmnist": Spec(
        functools.partial(load_torchvision, "FashionMNIST"), 28, 1, "affine+flip", ((0.2860,), (0.3530,))
    ),
    "folder": Spec(load_folder, 32, 3, "crop+flip"),
}


def pixel_statistics(source: Sequence) -> tuple[tuple, tuple]:
    """(mean, std) of the pixels per channel, in [0, 1]. For a constant channel std is 1, and there is a warning."""
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, len(source), math.ceil(len(source) / STATISTICS_IMAGES)):
        pixels = np.asarray(source[i][0], dtype=np.float64) / 255
        pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if (std <= CONSTANT).any():
        levels = ", ".join(f"{255 * level:.0f}" for level in mean)
        warn_once(f"in a channel all pixels of the training images are equal; the mean levels are {levels} of 255")
    return tuple(mean.tolist()), tuple(np.where(std > CONSTANT, std, 1.0).tolist())


def stratified_split(labels: list[int], every: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the indices of the images in two: (one in `every` images of each class, to within one image; the others).

    The images are sorted by class, and randomly within a class; then every `every`-th is taken. So a data set may be
    sorted by class.
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))
    in_first_part = np.arange(len(order)) % every == 0
    return np.sort(order[in_first_part]), np.sort(order[~in_first_part])


def subset(source: Sequence, labels: list[int], indices: np.ndarray) -> tuple[Sequence, list[int]]:
    """(source, labels) of only the images of these indices."""
    from torch.utils.data import Subset

    indices = indices.tolist()
    images = source.subset(indices) if hasattr(source, "subset") else Subset(source, indices)
    return images, [labels[i] for i in indices]
