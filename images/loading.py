"""Labelled images and their batches. Augmentation and order depend only on seed, epoch and sample."""

import atexit
import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from command_line.errors import ThisRankError, UserError
from images.image_folder import listed
from machine import ranks
from machine.signals import STOP_SIGNALS


class LoadingError(ThisRankError):
    """A batch that could not be loaded: an image or a process that loads images has failed."""


@dataclass(eq=False)
class Images(Dataset):
    """Labelled images with their transforms. The random numbers of a transform depend only on (seed, epoch, sample).

    Indexed by (epoch, sample), or by sample for epoch 0, so that it does not matter which process loads an image.
    labels: the labels of all images, known without reading the images; plain_transform: the transform without
    augmentation.
    """

    source: Sequence
    labels: list[int]
    transform: Callable
    plain_transform: Callable
    seed: int

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        image, label = self.source[sample]
        generator = torch.default_generator  # torch.manual_seed would reset CUDA's generators too
        state = generator.get_state()
        generator.manual_seed(mix(self.seed, epoch, sample))
        try:
            return self.transform(image), label
        finally:
            generator.set_state(state)

    def without_augmentation(self) -> "Images":
        """The same images with the transform of validation."""
        return Images(self.source, self.labels, self.plain_transform, self.plain_transform, self.seed)

    def class_names(self, n: int) -> list[str]:
        """The names of the n classes if the data set has them, else their numbers as strings."""
        source = self.source
        while isinstance(source, Subset):
            source = source.dataset
        names = getattr(source, "classes", ())
        return list(map(str, names if len(names) == n else range(n)))

    def class_counts(self) -> dict[str, int]:
        """The number of images in each class: name -> number, in the order of the labels."""
        counts = np.bincount(self.labels).tolist()
        return dict(zip(self.class_names(len(counts)), counts))

    def describe_classes(self) -> str:
        """The first classes with their numbers of images, for a log line."""
        return listed([f"{name} {count}" for name, count in self.class_counts().items()])

    def fingerprint(self) -> dict:
        """A dict of built-in types, saved with a run to check later whether the images are still the same.

        classes: `class_counts`; sha256: of the labels in order, each with the file name if images are files. Images are
        not read, so a file that changes but keeps its name is not noticed.
        """
        names = getattr(self.source, "names", [""] * len(self))
        lines = (os.fsencode(name) + b"\0%d\n" % label for name, label in zip(names, self.labels))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        return {"classes": self.class_counts(), "sha256": digest}

    def is_copy_of(self, other: "Images") -> bool:
        """Whether names and labels are equal, and the pixels of about ten images."""
        if len(self) != len(other) or self.fingerprint() != other.fingerprint():
            return False
        return all(self.source[i] == other.source[i] for i in range(0, len(self), math.ceil(len(self) / 10)))

    def normalisation(self) -> tuple[tuple, tuple]:
        """The (mean, std) per channel that normalise the pixels, which are in [0, 1]."""
        normalise = next(step for step in self.transform.transforms if isinstance(step, transforms.Normalize))
        return tuple(normalise.mean), tuple(normalise.std)


def check_unchanged(fingerprints: dict[str, dict], saved_fingerprints: dict[str, dict]) -> None:
    """Raise UserError, which says what differs, unless images are those of a saved run.

    fingerprints: "training", "test" or "held-out" -> the result of `Images.fingerprint`, now and in the saved run.
    """
    for name, now in fingerprints.items():
        saved = saved_fingerprints[name]
        before, after = saved["classes"], now["classes"]
        changed = [label for label in before | after if before.get(label) != after.get(label)]
        if changed:
            counts = listed([f"{label} {before.get(label, 0)} -> {after.get(label, 0)}" for label in changed])
            raise UserError(f"the {name} images are no longer those of the run; images of a class: {counts}")
        if saved != now:
            raise UserError(f"the {name} images are no longer those of the run: they have other names or labels")


@dataclass
class Batches:
    """Yields this rank's rows of each batch, as (epoch, sample) keys. The order depends only on (seed, epoch).

    With `shuffle`, in training, a last batch of a single image is dropped, since BN needs more than one value. epoch,
    first: the epoch, and the number of its first batch, of the next iteration.
    """

    samples: Sequence[int]
    batch_size: int
    shuffle: bool
    seed: int
    epoch: int = 0
    first: int = 0

    def __len__(self):
        n = len(self.samples)
        return math.ceil((n - 1 if self.shuffle and self.batch_size > 1 else n) / self.batch_size)

    def __iter__(self):
        samples = np.asarray(self.samples)
        if self.shuffle:
            samples = np.random.default_rng([self.seed, self.epoch]).permutation(samples)
        for i in range(self.first, len(self)):
            batch = samples[i * self.batch_size : (i + 1) * self.batch_size]
            yield [(self.epoch, sample) for sample in batch[ranks.rows(len(batch))].tolist()]


class Loader:
    """Loads this rank's rows of each batch, in `workers` processes, as channels-last tensors on `device`.

    images: an `Images`; samples: the indices of the images to use. `len(loader)` is the number of batches.
    """

    def __init__(
        self,
        images: Images,
        samples: Sequence[int],
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.batches = Batches(samples, batch_size, shuffle, seed)
        if len(self.batches) == 0:
            raise UserError(f"too few images: {len(samples)} where at least {2 if shuffle else 1} are needed")
        self.device = device
        self.loader = DataLoader(
            images,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that creating workers draws no number from the global generator
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self):
        return len(self.batches)

    def samples(self, epoch: int, batch: int) -> np.ndarray:
        """The indices of this rank's images in a batch of an epoch."""
        keys = next(iter(replace(self.batches, epoch=epoch, first=batch)))
        return np.array([sample for _, sample in keys])

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield (X, y, n) for each batch from number `first`: images (N, C, H, W) and labels (N,), on the device.

        X and y are this rank's rows of a global batch of n images. Raises LoadingError if a batch cannot be loaded.
        """
        self.batches.epoch, self.batches.first = epoch, first
        n_left = len(self.batches.samples) - first * self.batches.batch_size
        for X, y in self._loaded_batches():
            n = min(n_left, self.batches.batch_size)
            n_left -= n
            images = X.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            yield images, y.to(self.device, non_blocking=True), n

    def _loaded_batches(self):
        try:
            batches = iter(self.loader)
            if hasattr(signal, "SIGCHLD"):  # by default a worker's end raises an error at once, in the midst of a step
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except UserError as error:  # from a worker its text is a traceback, with the message at the end
            raise LoadingError(str(error).rpartition("UserError: ")[2]) from None
        except (OSError, RuntimeError) as error:
            if self.loader.num_workers == 0:
                raise
            raise LoadingError(
                f"a process that loads images has failed ({str(error)[-200:]}); if memory, shared memory (Docker: "
                "--shm-size 8g) or open files (ulimit -n 4096) have run out, lower --workers (0: none) or --batch-size"
            ) from None


def _leave_signals_to_the_main_process(worker):
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Kill the workers at exit. Python would send SIGTERM, which they ignore, and wait for them forever."""
    for process in multiprocessing.active_children():
        process.kill()


def mix(*numbers: int) -> int:
    """Derive one seed from several natural numbers. Seeds of neighbouring numbers are unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
