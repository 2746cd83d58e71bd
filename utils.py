"""Small helpers of both scripts."""

import logging
import math
import os
import sys
from pathlib import Path

import torch

from data_sets import DATASETS, Images, pixel_statistics
from errors import UserError
from preproc import data_transforms

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"


def get_data(dataset, data_path, cutout_length, validation, image_size=None, image_channels=None, seed=0):
    """Load a data set: [input_size, input_channels, n_classes, train_data], and valid_data if `validation`.

    dataset: a key of `DATASETS`; data_path: its folder; cutout_length: pixels, in training, at most half the image's
    side (16 would leave nothing of 8x8 pixels); image_size (pixels a side) and image_channels (1 or 3): of `folder`'s
    images, others have their own; seed: of the augmentation. The data are `Images`. Raises UserError where the data set
    is unknown or not to be had.
    """
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    size, channels = spec.size, spec.channels
    if dataset == "folder":
        size, channels = image_size or size, image_channels or channels
    source, labels, n_classes = spec.load(data_path, True, size, channels)
    mean_std = spec.mean_std or pixel_statistics(source)
    train, valid = data_transforms(dataset, min(cutout_length, size // 2), size, mean_std)
    data = [size, channels, n_classes, Images(source, labels, train, valid, seed)]
    if validation:
        source, labels, _ = spec.load(data_path, False, size, channels)
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
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(file_path, encoding="utf-8")):
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


def param_size(model):
    """Millions (10^6) of parameters, without the auxiliary head's, as papers count them."""
    names = (name for name, _ in model.named_parameters() if not name.startswith("aux_head."))
    return sum(model.get_parameter(name).numel() for name in names) / 1e6


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


def cosine_lr(optim, epochs, lr_min=0.0, done=0):
    """A scheduler, stepped once an epoch, that takes the learning rate to lr_min along half a cosine.

    In closed form of the number of epochs done, so that a resumed run may be given another number of epochs.
    """

    def factor(epoch):
        lowest = lr_min / optim.param_groups[0]["initial_lr"]
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optim, factor, last_epoch=done - 1)


def save_checkpoint(state, folder, is_best=False):
    """Save tensors and built-in types as checkpoint.pt in the folder, and as best.pt too if `is_best`.

    A file is complete or as it was: each is written beside its place, flushed to disk, and renamed.
    """
    for name in [BEST] * is_best + [CHECKPOINT]:  # a run killed between the two does the epoch again
        path = Path(folder) / name
        beside = path.with_suffix(".tmp")
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
