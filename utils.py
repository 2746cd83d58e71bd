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
from running.checkpoints import save_checkpoint  # noqa: F401 - older DARTS code has it in utils
from running.data_sets import DATASETS, hold_out_of_training, pixel_statistics
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
    hold_out=0.0,
):
    """Load a data set: [input_size, input_channels, n_classes, train_data], and valid_data if `validation`.

    dataset: a key of `DATASETS`; data_path: its folder; cutout_length: in pixels, for training, reduced to half of the
    image's side if it is larger; seed: of the augmentation; mean_std: per channel, to normalise by instead of the data
    set's. For the data set `folder` only: image_size (pixels a side) and image_channels (1 or 3); skip_bad_images:
    leave out images that cannot be read; crops: random crops of any scale in training, as for ImageNet;
    hold_out_by_name: False to hold out the test images that older versions chose. hold_out: a fraction of the training
    images which then are valid_data, in the place of the test images: these are not opened. train_data and valid_data
    are `Images`. Raises UserError if the data set is unknown or cannot be loaded.
    """
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "hold_out_by_name": hold_out_by_name}
    size, channels, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, n_classes = load(train=True)
    if hold_out:
        source, labels, *held_out = hold_out_of_training(source, labels, hold_out)
    mean_std = mean_std or DATASETS[dataset].mean_std or pixel_statistics(source)
    train, valid = data_transforms(dataset, min(cutout_length, size // 2), size, mean_std, crops)
    data = [size, channels, n_classes, Images(source, labels, train, valid, seed)]
    if validation and hold_out:
        data.append(Images(*held_out, valid, valid, seed))
    elif validation:
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
    """Only the test images, as the valid_data of `get_data`. A `folder` with val/ needs no train/ then."""
    folder_options = {"skip_bad_images": skip_bad_images, "whole": crops, "hold_out_by_name": hold_out_by_name}
    size, _, load = _data_set(dataset, data_path, image_size, image_channels, folder_options)
    source, labels, _ = load(train=False)
    _, valid = data_transforms(dataset, 0, size, mean_std, crops)
    return Images(source, labels, valid, valid, seed=0)


def image_shape(dataset, image_size=None, image_channels=None):
    """(size, channels) of a data set's images: pixels a side, and 1 or 3. The options are of `folder`."""
    return _data_set(dataset, "", image_size, image_channels, {})[:2]


def _data_set(dataset, data_path, image_size, image_channels, folder_options):
    """(size, channels, load) of a data set. load(train=...) calls its `Spec.load` with these options."""
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    if dataset != "folder":
        return spec.size, spec.channels, functools.partial(spec.load, data_path, size=spec.size, channels=spec.channels)
    size, channels = image_size or spec.size, image_channels or spec.channels
    return size, channels, functools.partial(spec.load, data_path, size=size, channels=channels, **folder_options)


def get_logger(file_path):
    """The logger `darts`, which writes to standard output and appends to a file. Closes the handlers of earlier calls.

    Its messages do not go to the root logger, which libraries configure.
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
    """A log file. If a line cannot be written, as on a full disk, it is lost, and the run continues."""

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
    """The number of parameters in millions, without the auxiliary head, as papers count them."""
    names = (name for name, _ in model.named_parameters() if not name.startswith("aux_head."))
    return sum(model.get_parameter(name).numel() for name in names) / 1e6


@contextlib.contextmanager
def garbage_collection_of_new_objects():
    """Inside, Python's garbage collector ignores all objects that exist on entry (260,000 in a search).

    Otherwise it would traverse them about every third step, which takes a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.freeze)  # the collection at exit would take a second
    try:
        yield
    finally:
        gc.unfreeze()


def shell_quote(text):
    """The text as one word for a shell: in double quotes if it has single quotes, as a genotype, and these suffice."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


def one_line(value):
    """str(value) with each run of white space replaced by a blank."""
    return " ".join(str(value).split())


class AverageMeter:
    """A running mean. val: the last value; avg: the mean of all values, weighted by their n."""

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
    """Top-k accuracy: the fraction of samples whose target is among the k largest logits, a tensor for each k in topk.

    output: (N, n_classes); target: (N,). If there are at most k classes it is 1.
    """
    n_classes = output.size(1)
    ranked = output.topk(min(max(topk), n_classes), dim=1).indices
    hits = ranked == target.unsqueeze(1)
    return [hits[:, :k].any(dim=1).float().mean() for k in topk]


def exponential_lr(optim, decay, done=0):
    """A scheduler, stepped once per epoch, that multiplies the learning rate by `decay`. done: epochs trained."""
    return torch.optim.lr_scheduler.LambdaLR(optim, lambda epoch: decay**epoch, last_epoch=done - 1)


def cosine_lr(optim, epochs, lr_min=0.0, done=0):
    """A scheduler, stepped once per epoch: cosine annealing of the learning rate to lr_min. done: epochs trained.

    It computes the rate from the number of epochs done, so that a resumed run may have another total of epochs.
    """

    def factor(epoch):
        lowest = lr_min / optim.param_groups[0]["initial_lr"]
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optim, factor, last_epoch=done - 1)
