"""The registry of data sets, `DATASETS`, and how data sets are split.

To add a data set, add an entry to `DATASETS`; tests run on every entry. torch is imported only when a data set is
loaded, so that command lines are read without it.
"""

import collections
import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from command_line.errors import UserError
from images.image_folder import is_hidden, list_folder, listed, open_image, warn_once

HELD_OUT = 5  # if a data set has no test images, one in HELD_OUT images is held out as such
DAMAGED = (AssertionError, EOFError, LookupError, TypeError, ValueError)  # torchvision's errors for damaged files
CONSTANT = 1e-6  # a channel with a smaller standard deviation, of pixels in [0, 1], is constant up to rounding
STATISTICS_IMAGES = 10_000  # mean and std are computed from at most so many training images, evenly spaced


@dataclass(frozen=True)
class Spec:
    """The description of a data set.

    load: a function (path, train, size, channels) -> (source, labels, n_classes), where source[i] is (PIL image, label)
    with `size` pixels a side and `channels` channels, and labels is a list of integers. It is called with `train`,
    `size` and `channels` as keyword arguments. augmentation: a kind of `preproc.augmentation`; mean_std: (mean, std) of
    the pixels per channel, or None to compute them from the images.
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
    """Whether a file in MNIST's format has the length that its header implies.

    Header: two zero bytes, the type (8: bytes), the number of dimensions, the dimensions as big-endian 32-bit integers.
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
    """scikit-learn's 1,797 handwritten digits, which are part of the library. A fixed fifth of them is the test set."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = [Image.fromarray(image) for image in np.round(digits.images * (255 / 16)).astype(np.uint8)]
    source = list(zip(images, digits.target.tolist()))
    return *hold_out(source, digits.target.tolist(), train), 10


def load_folder(path, train, size, channels, skip_bad_images=False, whole=False, hold_out_by_name=True):
    """Images in `path`/train/CLASS/ and `path`/val/CLASS/. Without val/, about a fifth of train/ is the test set.

    whole: do not resize the images; skip_bad_images: read all images first, and leave out those that cannot be read,
    with a warning that counts them; hold_out_by_name: choose the test set by `held_out_by_name`; False: by
    `stratified_split`, as older versions did.
    """
    root = Path(path)
    read = functools.partial(open_image, size=None if whole else size, mode={1: "L", 3: "RGB"}[channels])
    has_val = (root / "val").is_dir()
    _warn_of_other_folders(root, has_val)
    folder = list_folder(root / ("val" if has_val and not train else "train"), read, skip_bad_images, data_path=root)
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
    """Warn if there are other folders than train/ and val/: they are not read."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    others = [name for name in names if name not in ("train", "val") and not is_hidden(name)]
    if others and "train" in names:
        without = "" if has_val else ", and without val/ a fifth of train/ is held out"
        warn_once(f"{root}: only train/ and val/ are read, not {listed(others)}{without}")


def held_out_by_name(names, labels):
    """Choose test images by a hash of their names: a boolean array, True for each image that is held out.

    An image is held out if its hash is in the lowest of `HELD_OUT` equal ranges, so about one in `HELD_OUT` is. That
    depends on its own name only, so adding images does not move others between the sets. There are two exceptions, so
    that each class is in both sets: the image with the smallest hash of a class is always held out, that with the
    largest never.
    """
    hashes = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names], np.uint64)
    in_test = hashes < 2**64 // HELD_OUT
    order = np.lexsort((hashes, labels))  # by class, and within it by hash
    starts = np.flatnonzero(np.diff(np.asarray(labels)[order], prepend=-1))
    in_test[order[starts]] = True
    in_test[order[np.append(starts[1:], len(order)) - 1]] = False
    return in_test


def hold_out_of_training(source, labels, fraction):
    """Hold out a fraction of the training images: (training source, its labels, held-out source, its labels).

    Stratified: of each class with n images, round(fraction * n) are held out, but at least one and not all. Which these
    are depends only on the names of the class's images, or on their numbers where they are no files: those with the
    smallest hashes. So all runs hold out the same images, and an image that is added moves at most one other. Raises
    UserError where a class has a single image.
    """
    from torch.utils.data import Subset

    names = getattr(source, "names", None) or map(str, range(len(labels)))
    # other hashes than `held_out_by_name` has: the training images that it leaves have its larger ones
    hashes = [hashlib.sha256(b"hold out\0" + os.fsencode(name)).digest() for name in names]
    members, held_out = collections.defaultdict(list), []
    for i, label in enumerate(labels):
        members[label].append(i)
    for label in sorted(members):
        of_class = sorted(members[label], key=hashes.__getitem__)
        if len(of_class) < 2:
            raise UserError(f"--hold-out needs two training images of each class; class number {label} has one")
        held_out += of_class[: min(max(round(fraction * len(of_class)), 1), len(of_class) - 1)]
    parts = sorted(set(range(len(labels))) - set(held_out)), sorted(held_out)
    take = source.part if hasattr(source, "part") else functools.partial(Subset, source)
    return tuple(item for part in parts for item in (take(part), [labels[i] for i in part]))


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
    """(mean, std) of the pixels per channel, in [0, 1]. For a constant channel std is 1, and there is a warning."""
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
    """Split the indices of the images in two: (one in `every` images of each class, to within one image; the others).

    The images are sorted by class, and randomly within a class; then every `every`-th is taken. So a data set may be
    sorted by class.
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))
    in_first_part = np.arange(len(order)) % every == 0
    return np.sort(order[in_first_part]), np.sort(order[~in_first_part])


def hold_out(source, labels, train):
    """The training or test part of a data set that has no test images. The split does not depend on the run's seed."""
    from torch.utils.data import Subset

    test_part, train_part = stratified_split(labels, HELD_OUT, seed=0)
    part = (train_part if train else test_part).tolist()
    return Subset(source, part), [labels[i] for i in part]
