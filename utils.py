"""Helpers that search.py and augment.py share."""

import functools
import math

import torch

from command_line.errors import UserError, warn
from images.data_sets import DATASETS, hold_out_of_training, pixel_statistics
from images.image_folder import distinguishable, listed
from images.loading import Images
from models.costs import param_size
from preproc import data_transforms
from run.checkpoints import save_checkpoint
from run.loggers import get_logger
from run.progress import AverageMeter, accuracy

__all__ = [  # what DARTS codes have in utils.py
    "AverageMeter",
    "accuracy",
    "get_data",
    "get_logger",
    "param_size",
    "save_checkpoint",
]


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
    hold_out=0.0,
    augmentation=None,
    resize="crop",
):
    """Load a data set: [input_size, input_channels, n_classes, train_data], and valid_data if `validation`.

    dataset: a key of `DATASETS`; data_path: its folder; cutout_length: in pixels, for training, reduced to half of the
    image's side if it is larger; seed: of the augmentation; mean_std: per channel, to normalise by instead of the data
    set's. For the data set `folder` only: image_size (pixels a side) and image_channels (1 or 3); skip_bad_images:
    leave out images that cannot be read; crops: random crops of any scale in training, as for ImageNet; resize: how an
    image that is not square gets its size, see `open_image`. hold_out: a fraction of the training images that
    becomes valid_data; the test images are not opened then. augmentation: see `data_transforms`. train_data
    and valid_data are `Images`. Raises UserError if the data set is unknown or cannot be loaded.
    """
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "resize": resize}
    size, channels, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, n_classes = load(train=True)
    if hold_out:
        source, labels, *held_out = hold_out_of_training(source, labels, hold_out)
    mean_std = mean_std or DATASETS[dataset].mean_std or pixel_statistics(source)
    cutout_length = min(cutout_length, size // 2)
    train, valid = data_transforms(dataset, cutout_length, size, mean_std, crops, augmentation, resize)
    data = [size, channels, n_classes, Images(source, labels, train, valid, seed)]
    if validation and hold_out:
        data.append(Images(*held_out, valid, valid, seed))
    elif validation:
        source, labels, n_test_classes = load(train=False)
        data.append(Images(source, labels, valid, valid, seed))
        differing = set(data[3].class_names(n_classes)) ^ set(data[4].class_names(n_test_classes))
        if differing:
            names = listed(distinguishable(sorted(differing)))
            raise UserError(f"{data_path}: train/ and val/ must hold the same classes; only one has {names}")
        if data[4].is_copy_of(data[3]):
            warn(f"{data_path}: val/ has the images of train/, so its accuracy says nothing about other images")
    return data


def get_test_data(
    dataset,
    data_path,
    mean_std,
    image_size=None,
    image_channels=None,
    skip_bad_images=False,
    crops=False,
    resize="crop",
):
    """Only the test images, as the valid_data of `get_data`. A `folder` with val/ needs no train/ then."""
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "resize": resize}
    size, _, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, _ = load(train=False)
    _, valid = data_transforms(dataset, 0, size, mean_std, crops, resize=resize)
    return Images(source, labels, valid, valid, seed=0)


def _data_set(dataset, data_path, image_size, image_channels, folder_options):
    """(size, channels, load) of a data set. load(train=...) calls its `Spec.load` with these options."""
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    if dataset != "folder":
        return spec.size, spec.channels, functools.partial(spec.load, data_path, size=spec.size, channels=spec.channels)
    size, channels = image_size or spec.size, image_channels or spec.channels
    return size, channels, functools.partial(spec.load, data_path, size=size, channels=channels, **folder_options)


def cosine_lr(optim, epochs, lr_min=0.0, done=0):
    """A scheduler, stepped once per epoch: cosine annealing of the learning rate to lr_min. done: epochs trained.

    It computes the rate from the number of epochs done, so that a resumed run may have another total of epochs.
    """

    def factor(epoch):
        lowest = lr_min / optim.param_groups[0]["initial_lr"]
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optim, factor, last_epoch=done - 1)
