"""Data sets behind one registry, and their splits.

A new data set is one entry in `DATASETS`; the tests walk the registry. Nothing here needs torch until a data set is
loaded, so that command lines are read without it.
"""

import functools
import math
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from running.errors import UserError, warn

HELD_OUT = 5  # where a data set has no test images of its own, every fifth image of each class is one
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
    try:
        source = getattr(datasets, name)(path, download=True, **split)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data set {name} was looked for in {Path(path).resolve()}, and could not be downloaded ({error}); "
            "offline there are --dataset digits, and --dataset folder --data-path DIR for images of your own"
        ) from None
    labels = [int(label) for label in (source.labels if name == "SVHN" else source.targets)]
    return source, labels, max(labels) + 1


def load_digits(path, train, size, channels):
    """scikit-learn's 1,797 handwritten digits, which come with the library; a fixed fifth of them is the test set."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = [Image.fromarray(image) for image in np.round(digits.images * (255 / 16)).astype(np.uint8)]
    source = list(zip(images, digits.target.tolist()))
    return *hold_out(source, digits.target.tolist(), train), 10


def load_folder(path, train, size, channels, skip_bad_images=False, whole=False):
    """Images in `path`/train/CLASS/ and `path`/val/CLASS/; without val/, a fixed fifth of train/ is held out.

    whole: leave them as large as they are; skip_bad_images: read all first, and leave out what cannot be read, with a
    warning that counts them.
    """
    root = Path(path)
    loader = functools.partial(open_image, size=None if whole else size, mode={1: "L", 3: "RGB"}[channels])
    image_folder = functools.partial(_image_folder, loader=loader, skip_bad_images=skip_bad_images)
    source = image_folder(root / "train")
    if not (root / "val").is_dir():
        fewest = min(source.classes, key=lambda name: source.targets.count(source.class_to_idx[name]))
        if source.targets.count(source.class_to_idx[fewest]) < HELD_OUT:
            raise UserError(f"{root}: without val/ each class needs {HELD_OUT} images in train/; {fewest} has fewer")
        return *hold_out(source, source.targets, train), len(source.classes)
    if train:
        return source, source.targets, len(source.classes)
    held_out = image_folder(root / "val")
    if held_out.classes != source.classes:
        differing = sorted(set(held_out.classes) ^ set(source.classes))
        raise UserError(f"{root}: train/ and val/ must hold the same classes; only one has {', '.join(differing)}")
    return held_out, held_out.targets, len(source.classes)


def _image_folder(root, loader, skip_bad_images):
    """torchvision's ImageFolder, with one line for a folder that it cannot use."""
    from torchvision import datasets

    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; --data-path must name a folder that holds train/CLASS/*")
    try:
        source = datasets.ImageFolder(root, loader=loader)
    except (OSError, RuntimeError) as error:
        raise UserError(f"image folder {root} must hold a folder of images for each class: {error}") from None
    if len(source.classes) < 2:
        raise UserError(f"image folder {root} holds one class, {source.classes[0]}; at least two are needed")
    if skip_bad_images:
        _leave_out_unreadable(source, root)
    return source


def _leave_out_unreadable(source, root):
    """Take the images that cannot be read off an ImageFolder."""

    def complaint(sample):
        try:
            source.loader(sample[0])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        complaints = list(pool.map(complaint, source.samples))
    bad = [text for text in complaints if text]
    if not bad:
        return
    source.samples = source.imgs = [sample for sample, text in zip(source.samples, complaints) if not text]
    source.targets = [target for _, target in source.samples]
    empty = [name for name, index in source.class_to_idx.items() if index not in source.targets]
    if empty:
        raise UserError(f"{root}: no image of {', '.join(empty)} can be read; the first: {bad[0]}")
    warn(f"{root}: {len(bad)} of {len(complaints)} images left out; the first: {bad[0]}")


def open_image(file, size, mode):
    """The image's centre, as a square of `size` pixels a side; the whole image where size is None."""
    try:
        with Image.open(file) as opened:
            if opened.mode == "F":
                raise ValueError("its pixels are real numbers, of no known range")
            if opened.mode.startswith("I;16"):  # which `convert` would clip at 255
                image = Image.fromarray((np.asarray(opened) // 256).astype(np.uint8)).convert(mode)
            else:
                image = opened.convert(mode)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {file}: {error}; --skip-bad-images goes on without it") from None
    if size is None:
        return image
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


DATASETS = {
    "digits": Spec(load_digits, 8, 1, "affine"),
    "cifar10": Spec(
        functools.partial(load_torchvision, "CIFAR10"), 32, 3, "crop+flip",
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
}  # fmt: skip


def pixel_statistics(source):
    """(mean, std) of the pixels of each channel, in [0, 1]; a constant channel's std is given as 1."""
    count, total, squares = 0, 0.0, 0.0
    for i in range(0, len(source), math.ceil(len(source) / STATISTICS_IMAGES)):
        pixels = np.asarray(source[i][0], dtype=np.float64) / 255
        pixels = pixels.reshape(pixels.shape[0] * pixels.shape[1], -1)
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())


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
