"""Labelled images and their batches. Augmentation and order depend only on seed, epoch and sample."""

import atexit
import hashlib
import math
import multiprocessing
import os
import signal
import threading

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from command_line.errors import UserError
from images.image_folder import listed
from machine import ranks
from machine.signals import STOP_SIGNALS

try:
    import resource
except ImportError:  # Windows
    resource = None


# What messages of PyTorch and Python about processes that load images contain, and what helps. Tried in this order.
REMEDIES = {
    "Too many open files": "raise the limit, as by ulimit -n 4096, or lower --workers (0: none)",
    "ancdata": "too many open files: raise the limit, as by ulimit -n 4096, or lower --workers (0: none)",
    "shared memory": "give /dev/shm more room (Docker: --shm-size 8g), or lower --workers (0: none) or --batch-size",
    "Bus error": "give /dev/shm more room (Docker: --shm-size 8g), or lower --workers (0: none) or --batch-size",
    "DataLoader worker": "it was killed, as when memory runs out: lower --workers (0: none) or --batch-size",
    "Cannot allocate memory": "memory has run out: lower --workers (0: none) or --batch-size",
}
FILES_OF_A_WORKER = 8  # that are open in the main process, at most: its pipes, and the tensors that are on their way


class LoadingError(UserError):
    """A batch that could not be loaded: an image or a process that loads images has failed."""


class Images(Dataset):
    """Labelled images with their transforms. The random numbers of a transform depend only on (seed, epoch, sample).

    Indexed by (epoch, sample), or by sample for epoch 0, so that it does not matter which process loads an image.
    labels: the labels of all images, known without reading the images; plain_transform: the transform without
    augmentation.
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
        sample = range(len(self))[sample]  # negative indices, and IndexError past the end, as in any sequence
        image, label = self.source[sample]
        generator = torch.default_generator  # torch.manual_seed would reset CUDA's generators too
        state = generator.get_state()
        generator.manual_seed(mix(self.seed, epoch, sample))
        try:
            return self.transform(image), label
        finally:
            generator.set_state(state)

    def without_augmentation(self):
        """The same images with the transform of validation."""
        return Images(self.source, self.labels, self.plain_transform, self.plain_transform, self.seed)

    def class_names(self, n):
        """The names of the n classes if the data set has them, else their numbers as strings."""
        source = self.source
        while hasattr(source, "dataset"):  # a torch.utils.data.Subset
            source = source.dataset
        names = getattr(source, "classes", None)
        return list(map(str, names)) if names is not None and len(names) == n else list(map(str, range(n)))

    def class_counts(self):
        """The number of images in each class: name -> number, in the order of the labels."""
        counts = np.bincount(self.labels).tolist()
        return dict(zip(self.class_names(len(counts)), counts))

    def describe_classes(self):
        """The first classes with their numbers of images, for a log line."""
        return listed([f"{name} {count}" for name, count in self.class_counts().items()])

    def fingerprint(self):
        """A dict of built-in types, saved with a run to check later whether the images are still the same.

        classes: `class_counts`; sha256: of the labels in order, each with the file name if images are files. Images are
        not read, so a file that changes but keeps its name is not noticed.
        """
        names = getattr(self.source, "names", [""] * len(self))
        lines = (os.fsencode(name) + b"\0%d\n" % label for name, label in zip(names, self.labels))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        return {"classes": self.class_counts(), "sha256": digest}

    def normalisation(self):
        """The (mean, std) per channel that normalise the pixels, which are in [0, 1]."""
        normalise = next(step for step in self.transform.transforms if isinstance(step, transforms.Normalize))
        return tuple(normalise.mean), tuple(normalise.std)


def difference(before, now):
    """Describe the difference of two results of `Images.fingerprint` in words; None if they are equal."""
    old, new = before["classes"], now["classes"]
    removed, added = [name for name in old if name not in new], [name for name in new if name not in old]
    words = [f"without class {listed(removed)}"] * bool(removed) + [f"with new class {listed(added)}"] * bool(added)
    counts = [f"{new[name]} of {name}, not {old[name]}" for name in old if new.get(name, old[name]) != old[name]]
    words += [f"images: {listed(counts)}"] * bool(counts)
    if not words and list(old) != list(new):
        words = ["with the classes in another order"]
    if not words and before["sha256"] != now["sha256"]:
        words = ["as many images, but with other names or labels"]
    return "; ".join(words) or None


def check_unchanged(images, results):
    """Raise UserError, which says what differs, unless these images are those of a saved run.

    images: "training", "test" or "held-out" -> `Images`; results: the saved results of the run, where results["data"]
    has the fingerprints under the same keys. Runs of older versions have no fingerprints, and are not checked.
    """
    before = results.get("data", {})
    for name in images.keys() & before.keys():
        changed = difference(before[name], images[name].fingerprint())
        if changed:
            raise UserError(f"the {name} images are no longer those of the run: {changed}")


class Batches(Sampler):
    """Yields this rank's rows of each batch, as (epoch, sample) keys. The order depends only on (seed, epoch).

    With `shuffle`, in training, a last batch of a single image is dropped, since BN needs more than one value.
    """

    def __init__(self, samples, batch_size, shuffle, seed):
        self.samples = np.asarray(samples)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = self.first = 0  # epoch and first batch of the next iteration; set by `Loader.epoch`

    def __len__(self):
        n = len(self.samples)
        return math.ceil((n - 1 if self.shuffle and self.batch_size > 1 else n) / self.batch_size)

    def __iter__(self):
        for samples in self.of(self.epoch)[self.first :]:
            yield [(self.epoch, sample) for sample in samples[ranks.rows(len(samples))].tolist()]

    def size(self, i):
        """The number of images in the i-th batch, over all ranks."""
        return min(self.batch_size, len(self.samples) - i * self.batch_size)

    def of(self, epoch):
        """The global batches of an epoch: a list of arrays of sample indices."""
        samples = self.samples
        if self.shuffle:
            samples = np.random.default_rng([self.seed, epoch]).permutation(samples)
        return [samples[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]


class Loader:
    """Loads this rank's rows of each batch, in `workers` processes, as channels-last tensors on `device`.

    images: an `Images`; samples: the indices of the images to use. `len(loader)` is the number of batches.
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
            generator=torch.Generator(),  # so that creating workers draws no number from the global generator
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __len__(self):
        return len(self.batches)

    def samples(self, epoch, batch):
        """The indices of the images in a global batch of an epoch."""
        return self.batches.of(epoch)[batch]

    def epoch(self, epoch, first=0):
        """Yield (X, y, n) for each batch from number `first`: images (N, C, H, W) and labels (N,), on the device.

        X and y are this rank's rows of a global batch of n images.
        """
        self.batches.epoch, self.batches.first = epoch, first
        try:
            if self.loader._iterator is None:
                _check_open_files(self.loader.num_workers)
            batches = iter(self.loader)
            _leave_failures_to_the_next_batch()
            for i, (X, y) in enumerate(batches, first):
                yield (
                    X.to(self.device, memory_format=torch.channels_last, non_blocking=True),
                    y.to(self.device, non_blocking=True),
                    self.batches.size(i),
                )
        except UserError as error:  # from a worker: its text is a traceback, with the message in the last line
            raise LoadingError(str(error).splitlines()[-1].removeprefix("command_line.errors.UserError: ")) from None
        except (OSError, RuntimeError) as error:
            text = str(error).strip()
            remedy = next((words for part, words in REMEDIES.items() if part in text), None)
            if remedy is None:
                raise
            last = text.splitlines()[-1]
            raise LoadingError(f"a process that loads images has failed: {remedy} ({last[:200]})") from None


def _check_open_files(workers):
    """Raise OSError if the limit on open files is too low for these processes, which would fail in endless tracebacks.

    A limit that this process may raise is raised.
    """
    if workers == 0 or resource is None or not os.path.isdir("/proc/self/fd"):
        return
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + FILES_OF_A_WORKER * workers + 16
    if limit < needed and (highest == resource.RLIM_INFINITY or highest >= needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, highest))
    elif limit < needed:
        raise OSError(f"Too many open files: {workers} processes need {needed}, and {limit} are allowed")


def _leave_failures_to_the_next_batch():
    """Take back the handler by which PyTorch raises the end of a worker anywhere, as in the midst of a step.

    Waiting for the next batch, PyTorch looks for workers that have ended every five seconds.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _leave_signals_to_the_main_process(worker):
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """Kill the workers at exit. Python would send SIGTERM, which they ignore, and wait for them forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report their end as a failure
    for process in multiprocessing.active_children():
        process.kill()


def mix(*numbers):
    """Derive one seed from several natural numbers. Seeds of neighbouring numbers are unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
