"""Data sets behind one registry, their splits, and batches whose randomness depends on (seed, epoch, sample) alone.

A new data set is one entry in `DATASETS`; the tests walk the registry.
"""

import atexit
import functools
import math
import multiprocessing
import signal
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets, transforms

import distributed
from errors import UserError

HELD_OUT = 5  # where a data set has no test images of its own, every fifth image of each class is one
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
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
    if distributed.rank() > 0:
        return
    print(f"warning: {root}: {len(bad)} of {len(complaints)} images left out; the first: {bad[0]}", file=sys.stderr)


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


class Images(Dataset):
    """Labelled images, transformed; what the transforms draw depends on (seed, epoch, sample) alone.

    Indexed by (epoch, sample), or by sample for epoch 0, so that it doesn't matter which process loads an image.
    `labels` are all images' labels, at no cost.
    """

    def __init__(self, source, labels, transform, plain_transform, seed):
        self.source = source
        self.labels = labels
        self.transform = transform
        self.plain_transform = plain_transform
        self.seed = seed

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        sample = range(len(self))[sample]  # IndexError past the end, as any sequence
        image, label = self.source[sample]
        generator = torch.default_generator  # torch.manual_seed would reset CUDA's generators too
        state = generator.get_state()
        generator.manual_seed(mix(self.seed, epoch, sample))
        try:
            return self.transform(image), label
        finally:
            generator.set_state(state)

    def without_augmentation(self):
        """The same images, as they are in validation."""
        return Images(self.source, self.labels, self.plain_transform, self.plain_transform, self.seed)

    def class_names(self, n):
        """The names of the n classes, where the data set tells, else their numbers."""
        source = self.source
        while hasattr(source, "dataset"):  # a part of another
            source = source.dataset
        names = getattr(source, "classes", None)
        return list(map(str, names)) if names is not None and len(names) == n else list(map(str, range(n)))

    def normalisation(self):
        """The (mean, std) per channel by which the pixels, in [0, 1], are normalised."""
        normalise = next(step for step in self.transform.transforms if isinstance(step, transforms.Normalize))
        return tuple(normalise.mean), tuple(normalise.std)


class Batches(Sampler):
    """This rank's rows of batches of (epoch, sample) keys, in an order that depends on (seed, epoch) alone.

    In training (`shuffle`) a last batch of a single image is left out: BN has no statistics of one value.
    """

    def __init__(self, samples, batch_size, shuffle, seed):
        self.samples = np.asarray(samples)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = self.first = 0  # of the next pass: its epoch, and the batch that it starts with

    def __len__(self):
        n = len(self.samples)
        return math.ceil((n - 1 if self.shuffle and self.batch_size > 1 else n) / self.batch_size)

    def __iter__(self):
        for samples in self.of(self.epoch)[self.first :]:
            yield [(self.epoch, sample) for sample in samples[distributed.rows(len(samples))].tolist()]

    def size(self, i):
        """The images in the i-th batch, over all ranks."""
        return min(self.batch_size, len(self.samples) - i * self.batch_size)

    def of(self, epoch):
        """The batches of an epoch, each an array of samples."""
        samples = self.samples
        if self.shuffle:
            samples = np.random.default_rng([self.seed, epoch]).permutation(samples)
        return [samples[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]


class Loader:
    """This rank's rows of each epoch's batches, loaded by `workers` processes, channels-last on `device`.

    images: an `Images`; samples: the indices of those to use. `len(loader)` is the number of batches.
    """

    def __init__(self, images, samples, batch_size, device, workers=0, shuffle=True, seed=0):
        self.batches = Batches(samples, batch_size, shuffle, seed)
        if len(self.batches) == 0:
            raise distributed.error(f"too few images: {len(samples)} where at least {2 if shuffle else 1} are needed")
        self.device = device
        self.loader = DataLoader(
            images,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # of its own, so that creating workers draws nothing from the global one
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self):
        return len(self.batches)

    def samples(self, epoch, batch):
        """The indices of the images in a batch of an epoch."""
        return self.batches.of(epoch)[batch]

    def epoch(self, epoch, first=0):
        """Yield (X, y, n) from batch `first` on: (N, C, H, W) float and (N,) integer tensors on the device.

        They are this rank's rows of a global batch of n images.
        """
        self.batches.epoch, self.batches.first = epoch, first
        try:
            for i, (X, y) in enumerate(self.loader, first):
                yield (
                    X.to(self.device, memory_format=torch.channels_last, non_blocking=True),
                    y.to(self.device, non_blocking=True),
                    self.batches.size(i),
                )
        except UserError as error:  # a worker's comes with its traceback, the message last
            raise UserError(str(error).splitlines()[-1].removeprefix("errors.UserError: ")) from None


def _leave_signals_to_the_main_process(worker):
    for name in STOPPING:
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Python waits for its workers at the end, and asks them by SIGTERM, to which these don't listen."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


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
    test_part, train_part = stratified_split(labels, HELD_OUT, seed=0)
    part = (train_part if train else test_part).tolist()
    return Subset(source, part), [labels[i] for i in part]


def mix(*numbers):
    """One seed from several natural numbers, so that neighbouring ones have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
