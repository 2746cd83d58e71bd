"""Data sets behind one registry, and their splits.

A new data set is one entry in `DATASETS`; the tests walk the registry. Nothing here needs torch until a data set is
loaded, so that command lines are read without it.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from running.errors import UserError
from running.image_folder import is_hidden, list_folder, listed, open_image, warn_once

HELD_OUT = 5  # where a data set has no test images of its own, one in five is held out
DAMAGED = (AssertionError, EOFError, LookupError, TypeError, ValueError)  # what torchvision raises at damaged files
CONSTANT = 1e-6  # standard deviation of pixels in [0, 1] that are all the same, by float rounding
STATISTICS_IMAGES = 10_000  # mean and std of a larger training set come from that many of its images, evenly spaced


@dataclass(frozen=True)
class Spec:
    """What the rest of the code needs to know of a data set.

    load(path, train, size, channels) returns (source, labels, n_classes): source[i] is (PIL image, label), of `size`
    pixels a side and `channels` channels; labels is a list of integers. `augmentation` is a key of
    `preproc.augmentation`; mean_std the pixels' (mean, std) per channel, None where it is computed from the images.
    """

    load: Callable
    size: int
    channels: int
    augmentation: str
    mean_std: tuple | None = None


def load_torchvision(name, path, train, size, channels):
    """A data set of torchvision's, downloaded to `path` if it isn't there."""
    from torchvision import datasets

    split = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    folder = Path(path).resolve()
    try:
        source = getattr(datasets, name)(path, download=True, **split)
    except (OSError, RuntimeError, *DAMAGED) as error:
        for file in sorted((folder / name / "raw").glob("*-ubyte")):
            if not is_whole_idx_file(file):
                raise UserError(f"{file} is damaged or cut off; delete it, and it is downloaded again") from None
        if isinstance(error, DAMAGED):
            reason = str(error) or type(error).__name__
            raise UserError(
                f"data set {name} in {folder} cannot be read ({reason}); delete it, and it is downloaded again"
            ) from None
        raise UserError(
            f"data set {name} was looked for in {folder}, and could not be downloaded ({error}); "
            "offline there are --dataset digits, and --dataset folder --data-path DIR for images of your own"
        ) from None
    labels = [int(label) for label in (source.labels if name == "SVHN" else source.targets)]
    return source, labels, max(labels) + 1


def is_whole_idx_file(file):
    """Whether a file of MNIST's format has the length that its header tells.

    The header: two zeros, the type (8: bytes), the number of dimensions, and each as a big-endian 32-bit integer.
    """
    with open(file, "rb") as opened:
        header = opened.read(4)
        if len(header) < 4 or header[:3] != b"\0\0\x08":
            return False
        dimensions = opened.read(4 * header[3])
    if len(dimensions) < 4 * header[3]:
        return False
    return file.stat().st_size == 4 + len(dimensions) + math.prod(np.frombuffer(dimensions, ">u4").tolist())


def load_digits(path, train, size, channels):
    """scikit-learn's 1,797 handwritten digits, which come with the library; a fixed fifth of them is the test set."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = [Image.fromarray(image) for image in np.round(digits.images * (255 / 16)).astype(np.uint8)]
    source = list(zip(images, digits.target.tolist()))
    return *hold_out(source, digits.target.tolist(), train), 10


def load_folder(path, train, size, channels, skip_bad_images=False, whole=False, hold_out_by_name=True):
    """Images in `path`/train/CLASS/ and `path`/val/CLASS/; without val/, about a fifth of train/ is held out.

    whole: leave them as large as they are; skip_bad_images: read all first, and leave out what cannot be read, with a
    warning that counts them; hold_out_by_name: choose the fifth by `held_out_by_name`, or as runs before that did.
    """
    root = Path(path)
    read = functools.partial(open_image, size=None if whole else size, mode={1: "L", 3: "RGB"}[channels])
    has_val = (root / "val").is_dir()
    _warn_of_other_folders(root, has_val)
    folder = list_folder(root / ("val" if has_val and not train else "train"), read, skip_bad_images)
    if not has_val:
        counts = np.bincount(folder.labels)
        if counts.min() < HELD_OUT:
            fewest = folder.classes[counts.argmin()]
            raise UserError(f"{root}: without val/ each class needs {HELD_OUT} images in train/; {fewest} has fewer")
        if hold_out_by_name:
            in_test = held_out_by_name(folder.names, folder.labels)
        else:
            in_test = np.zeros(len(folder), dtype=bool)
            in_test[stratified_split(folder.labels, HELD_OUT, seed=0)[0]] = True
        folder = folder.part(np.flatnonzero(in_test != train).tolist())
    return folder, folder.labels, len(folder.classes)


def _warn_of_other_folders(root, has_val):
    """Warn of folders beside train/ and val/, which nothing reads."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    others = [name for name in names if name not in ("train", "val") and not is_hidden(name)]
    if others and "train" in names:
        without = "" if has_val else ", and without val/ a fifth of train/ is held out"
        warn_once(f"{root}: only train/ and val/ are read, not {listed(others)}{without}")


def held_out_by_name(names, labels):
    """Which images are held out for the test: a boolean for each, by a hash of its name.

    An image is held out if its hash is in the lowest of `HELD_OUT` equal ranges. That depends on its name alone, so
    that images that are added move no other, and about one in `HELD_OUT` is held out. Two exceptions keep small classes
    usable: the smallest hash of a class is always held out, and the largest never.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names], np.uint64)
    in_test = hashes < 2**64 // HELD_OUT
    order = np.lexsort((hashes, labels))  # by class, and within it by hash
    starts = np.flatnonzero(np.diff(np.asarray(labels)[order], prepend=-1))
    in_test[order[starts]] = True
    in_test[order[np.append(starts[1:], len(order)) - 1]] = False
    return in_test


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


def pixel_statistics(source):
    """(mean, std) of the pixels of each channel, in [0, 1]; of a channel that is constant, with a warning, std is 1."""
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, len(source), math.ceil(len(source) / STATISTICS_IMAGES)):
        pixels = np.asarray(source[i][0], dtype=np.float64) / 255
        pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    for channel in np.flatnonzero(std <= CONSTANT).tolist():
        name = ("red", "green", "blue")[channel] if len(std) == 3 else "grey"
        warn_once(
            f"{name} is {255 * mean[channel]:.0f} of 255 in every pixel of the training images that were looked at"
        )
    return tuple(mean.tolist()), tuple(np.where(std > CONSTANT, std, 1.0).tolist())


def stratified_split(labels, every, seed):
    """Indices of the images, split in two: one in `every` of each class, and the others; each class within one image.

    A permutation by class and, within it, by chance: a data set sorted by class is split as any other.
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))
    taken = np.arange(len(order)) % every == 0
    return np.sort(order[taken]), np.sort(order[~taken])


def hold_out(source, labels, train):
    """The training or the test part of a data set that comes in one: the same split for every seed."""
    from torch.utils.data import Subset

    test_part, train_part = stratified_split(labels, HELD_OUT, seed=0)
    part = (train_part if train else test_part).tolist()
    return Subset(source, part), [labels[i] for i in part]
