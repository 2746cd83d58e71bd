"""Helpers that search.py and augment.py share."""

import atexit
import contextlib
import functools
import gc
import logging
import math
import shlex
import sys

import torch

from preproc import data_transforms
from running.checkpoints import save_checkpoint  # noqa: F401 - where users of older DARTS code look for it
from running.data_sets import DATASETS, pixel_statistics
from running.errors import UserError
from running.image_folder import listed
from running.loading import Images


def get_data(
    dataset,
    data_path,
    cutout_length,
    validation,
    image_size=None,
    image_channels=None,
    seed=0,
    skip_bad_images=False,
    crops=False,
    mean_std=None,
    hold_out_by_name=True,
):
    """Load a data set: [input_size, input_channels, n_classes, train_data], and valid_data if `validation`.

    dataset: a key of `DATASETS`; data_path: its folder; cutout_length: pixels, in training, at most half the image's
    side (16 would leave nothing of 8x8 pixels); image_size (pixels a side) and image_channels (1 or 3): of `folder`'s
    images, others have their own; seed: of the augmentation; skip_bad_images: leave out images of `folder` that cannot
    be read; crops: take random parts of `folder`'s images in training, as for ImageNet; mean_std: to normalise by, per
    channel, instead of the data set's; hold_out_by_name: False for the test images of `folder` without val/ that older
    versions chose. The data are `Images`. Raises UserError where the data set is unknown or not to be had.
    """
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "hold_out_by_name": hold_out_by_name}
    size, channels, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, n_classes = load(train=True)
    mean_std = mean_std or DATASETS[dataset].mean_std or pixel_statistics(source)
    train, valid = data_transforms(dataset, min(cutout_length, size // 2), size, mean_std, crops)
    data = [size, channels, n_classes, Images(source, labels, train, valid, seed)]
    if validation:
        source, labels, n_test_classes = load(train=False)
        data.append(Images(source, labels, valid, valid, seed))
        differing = set(data[3].class_names(n_classes)) ^ set(data[4].class_names(n_test_classes))
        if differing:
            names = listed(sorted(differing))
            raise UserError(f"{data_path}: train/ and val/ must hold the same classes; only one has {names}")
    return data


def get_test_data(
    dataset,
    data_path,
    mean_std,
    image_size=None,
    image_channels=None,
    skip_bad_images=False,
    crops=False,
    hold_out_by_name=True,
):
    """The test images alone, `valid_data` of `get_data`: of a `folder` with val/, train/ may be missing."""
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "hold_out_by_name": hold_out_by_name}
    size, _, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, _ = load(train=False)
    _, valid = data_transforms(dataset, 0, size, mean_std, crops)
    return Images(source, labels, valid, valid, seed=0)


def _data_set(dataset, data_path, image_size, image_channels, folder_options):
    """(size, channels, load) of a data set: load(train=...) is its registry entry's `load` with these options."""
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    if dataset != "folder":
        return spec.size, spec.channels, functools.partial(spec.load, data_path, size=spec.size, channels=spec.channels)
    size, channels = image_size or spec.size, image_channels or spec.channels
    return size, channels, functools.partial(spec.load, data_path, size=size, channels=channels, **folder_options)


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
    """A log file that on a full disk loses lines, and does not end the run."""

    warned = False

    def handleError(self, record):
        if not self.warned:
            self.warned = True
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
def garbage_collection_of_new_objects():
    """Inside, garbage collection skips the objects that exist now: modules and the network, 260,000 in a search.

    It would go through them every third step, in a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.freeze)  # the collection at the interpreter's end would take a second too
    try:
        yield
    finally:
        gc.unfreeze()


def shell_quote(text):
    """The text as one word of a shell's: as it is, in double quotes where that is enough, as for a genotype."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


def one_line(value):
    """The value as text without line breaks."""
    return " ".join(str(value).split())


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
