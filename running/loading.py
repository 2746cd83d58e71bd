"""Labelled images in batches, whose randomness depends on (seed, epoch, sample) alone."""

import atexit
import hashlib
import math
import multiprocessing
import os
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from running import ranks
from running.errors import UserError
from running.image_folder import listed
from running.signals import STOP_SIGNALS


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

    def class_counts(self):
        """The number of images of each class: name -> number, in the order of labels."""
        counts = np.bincount(self.labels).tolist()
        return dict(zip(self.class_names(len(counts)), counts))

    def describe_classes(self):
        """The classes with their numbers of images, for a log line; of many the first."""
        return listed([f"{name} {count}" for name, count in self.class_counts().items()])

    def fingerprint(self):
        """What is saved with a run, to tell later whether these are still its images; of built-in types.

        classes: `class_counts`; sha256: of the labels in order, each with its file's name where images are files. No
        image is read: pixels that change under the same name are not noticed.
        """
        names = getattr(self.source, "names", [""] * len(self))
        lines = (os.fsencode(name) + b"\0%d\n" % label for name, label in zip(names, self.labels))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        return {"classes": self.class_counts(), "sha256": digest}

    def normalisation(self):
        """The (mean, std) per channel by which the pixels, in [0, 1], are normalised."""
        normalise = next(step for step in self.transform.transforms if isinstance(step, transforms.Normalize))
        return tuple(normalise.mean), tuple(normalise.std)


def difference(before, now):
    """What differs between two of `Images.fingerprint`'s, in words; None where they are equal."""
    old, new = before["classes"], now["classes"]
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    words = [f"without class {listed(gone)}"] * bool(gone) + [f"with new class {listed(added)}"] * bool(added)
    counts = [f"{new[name]} of {name}, not {old[name]}" for name in old if new.get(name, old[name]) != old[name]]
    words += [f"images: {listed(counts)}"] * bool(counts)
    if not words and list(old) != list(new):
        words = ["with the classes in another order"]
    if not words and before["sha256"] != now["sha256"]:
        words = ["as many images, but with other names or labels"]
    return "; ".join(words) or None


def check_unchanged(images, results):
    """Raise UserError, saying what differs, unless these images are those of a run.

    images: "training" or "test" -> `Images`; results: those saved with the run, whose "data" has fingerprints under the
    same names. A run of an older version has none, and is accepted.
    """
    before = results.get("data", {})
    for name in images.keys() & before.keys():
        changed = difference(before[name], images[name].fingerprint())
        if changed:
            raise UserError(f"the {name} images are no longer those of the run: {changed}")


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
            yield [(self.epoch, sample) for sample in samples[ranks.rows(len(samples))].tolist()]

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
            raise ranks.user_error(f"too few images: {len(samples)} where at least {2 if shuffle else 1} are needed")
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
            raise UserError(str(error).splitlines()[-1].removeprefix("running.errors.UserError: ")) from None


def _leave_signals_to_the_main_process(worker):
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Python waits for its workers at the end, and asks them by SIGTERM, to which these don't listen."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would take their end for a failure
    for process in multiprocessing.active_children():
        process.kill()


def mix(*numbers):
    """One seed from several natural numbers, so that neighbouring ones have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
