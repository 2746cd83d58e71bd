"""Small helpers of both scripts."""

import atexit
import contextlib
import functools
import gc
import hashlib
import io
import logging
import math
import os
import pickle
import sys
import warnings
from pathlib import Path

import torch

from data_sets import DATASETS, Images, pixel_statistics
from errors import UserError
from preproc import data_transforms

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"
FORMAT = 2  # of checkpoints
SEAL = b"sha256 of the file without this comment: "


def get_data(
    dataset, data_path, cutout_length, validation, image_size=None, image_channels=None, seed=0, skip_bad_images=False,
    crops=False, mean_std=None,
):  # fmt: skip
    """Load a data set: [input_size, input_channels, n_classes, train_data], and valid_data if `validation`.

    dataset: a key of `DATASETS`; data_path: its folder; cutout_length: pixels, in training, at most half the image's
    side (16 would leave nothing of 8x8 pixels); image_size (pixels a side) and image_channels (1 or 3): of `folder`'s
    images, others have their own; seed: of the augmentation; skip_bad_images: leave out images of `folder` that cannot
    be read; crops: take random parts of `folder`'s images in training, as for ImageNet; mean_std: to normalise by, per
    channel, instead of the data set's. The data are `Images`. Raises UserError where the data set is unknown or not to
    be had.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    size, channels = spec.size, spec.channels
    load = spec.load
    if dataset == "folder":
        size, channels = image_size or size, image_channels or channels
        load = functools.partial(load, skip_bad_images=skip_bad_images, whole=crops)
    source, labels, n_classes = load(data_path, True, size, channels)
    mean_std = mean_std or spec.mean_std or pixel_statistics(source)
    train, valid = data_transforms(dataset, min(cutout_length, size // 2), size, mean_std, crops)
    data = [size, channels, n_classes, Images(source, labels, train, valid, seed)]
    if validation:
        source, labels, _ = load(data_path, False, size, channels)
        data.append(Images(source, labels, valid, valid, seed))
    return data


def get_logger(file_path):
    """The logger `darts`, writing to standard output and appending to a file; handlers of an earlier call are closed.

    It doesn't pass on to the root logger, which libraries write to.
    """
    logger = logging.getLogger("darts")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    form = logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (logging.StreamHandler(sys.stdout), _LogFile(file_path, encoding="utf-8")):
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


class _LogFile(logging.FileHandler):
    """A log file that on a full disk costs lines, not the run."""

    told = False

    def handleError(self, record):
        if not self.told:
            self.told = True
            print(f"warning: cannot write to {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self):
        try:
            super().close()
        except OSError:
            self.stream = None


def param_size(model):
    """Millions (10^6) of parameters, without the auxiliary head's, as papers count them."""
    names = (name for name, _ in model.named_parameters() if not name.startswith("aux_head."))
    return sum(model.get_parameter(name).numel() for name in names) / 1e6


@contextlib.contextmanager
def objects_that_stay():
    """Within this, garbage collection leaves alone what was there before: modules and the network, 260,000 objects in
    a search, which it would go through every third step, in a fifth of a second."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.freeze)  # at the interpreter's end too, where it takes a second
    try:
        yield
    finally:
        gc.unfreeze()


class AverageMeter:
    """A running mean: `val` is the last value, `avg` the mean, weighted by the counts that came with the values."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def accuracy(output, target, topk=(1,)):
    """Fractions of the samples whose target is among the k largest logits, a scalar tensor for each k of `topk`.

    output: (N, n_classes); target: (N,). With fewer than k classes every sample counts.
    """
    n_classes = output.size(1)
    ranked = output.topk(min(max(topk), n_classes), dim=1).indices
    hits = ranked == target.unsqueeze(1)
    return [hits[:, :k].any(dim=1).float().mean() for k in topk]


def exponential_lr(optim, decay, done=0):
    """A scheduler, stepped once an epoch, that multiplies the learning rate by `decay`; resumed after `done` epochs."""
    return torch.optim.lr_scheduler.LambdaLR(optim, lambda epoch: decay**epoch, last_epoch=done - 1)


def cosine_lr(optim, epochs, lr_min=0.0, done=0):
    """A scheduler, stepped once an epoch, that takes the learning rate to lr_min along half a cosine.

    In closed form of the number of epochs done, so that a resumed run may be given another number of epochs.
    """

    def factor(epoch):
        lowest = lr_min / optim.param_groups[0]["initial_lr"]
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optim, factor, last_epoch=done - 1)


class DamagedCheckpointError(UserError):
    """A checkpoint that is cut off or changed."""


def save_checkpoint(state, folder, is_best=False):
    """Save tensors and built-in types as checkpoint.pt in the folder, and as best.pt too if `is_best`.

    A file is complete or as it was: each is written beside its place, flushed to disk, and renamed. What checkpoint.pt
    held before is kept as previous.pt. Each ends with its checksum, which `load_checkpoint` checks and `torch.load`
    doesn't mind. Raises OSError if a file cannot be written; those that were there stay.
    """
    folder, data = Path(folder), _sealed(state)
    for name in [BEST] * is_best + [CHECKPOINT]:  # a run killed between the two comes here again
        path = folder / name
        beside = path.with_suffix(".tmp")
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        if name == CHECKPOINT and path.exists():
            _keep_as(path, folder / PREVIOUS)
        os.replace(beside, path)
    _flush_names(folder)


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, onto the CPU; nothing in the file is run.

    Raises DamagedCheckpointError where its checksum is missing or another, UserError where it holds more than tensors
    and built-in types, FileNotFoundError where there is none.
    """
    data = Path(path).read_bytes()
    body, seal, _ = data.rpartition(SEAL)
    sealed = seal and data == _seal(body[:-2] + b"\0\0")
    if seal and not sealed:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is another")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not data.startswith((b"PK\x03\x04", b"\x80")):  # neither an archive nor a pickle
            raise DamagedCheckpointError(f"{path} is damaged: it is no checkpoint") from None
        raise UserError(f"{path} is refused: it holds more than tensors and plain types") from None
    except MemoryError:
        raise
    except Exception:  # damaged files make the reader raise a dozen types, none of them documented
        raise DamagedCheckpointError(f"{path} cannot be read: it is damaged") from None
    if not sealed and isinstance(state, dict) and state.get("format") == FORMAT:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is missing")
    return state


def _sealed(state):
    """The bytes of torch.save, with their checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _seal(buffer.getvalue())


def _seal(archive):
    """A zip archive with its checksum as its comment, whose length, until then 0, is the archive's last two bytes."""
    seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def _keep_as(path, previous):
    """Let `previous` name the file too, whatever it named before; where files have one name only, instead."""
    beside = previous.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(beside, previous)


def _flush_names(folder):
    """Let a folder's renamed files survive a crash of the machine, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
