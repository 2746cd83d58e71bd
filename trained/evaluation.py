"""Trained networks: load them from checkpoints, run them on images, and use them to initialise a training."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from command_line.errors import UserError
from config import AugmentConfig
from genotypes import from_str
from images.loading import Images, Loader, check_unchanged
from machine import ranks
from machine.devices import pick_device
from models.augment_cnn import AugmentCNN
from run.checkpoint_checks import check_contents, check_size, state_misfit
from run.checkpoints import load_checkpoint
from run.folder import RunFolder
from utils import get_data, get_test_data, image_shape


@dataclass
class Evaluation:
    """The predictions of a network for the test images, or for those that were held out of its training.

    labels: the true classes, (N,); probabilities: (N, n_classes); names: the names of the classes; images: the images,
    an `Images`; checkpoint: the file that the network was loaded from; part: which images these are, `test` or
    `held-out`.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    names: list
    images: Images
    checkpoint: str
    part: str = "test"

    @property
    def top1(self):
        return float((self.probabilities.argmax(1) == self.labels).mean())

    def confusion(self):
        """The confusion matrix: counts, (true class, predicted class)."""
        counts = np.zeros((len(self.names), len(self.names)), dtype=int)
        np.add.at(counts, (self.labels, self.probabilities.argmax(1)), 1)
        return counts

    def wrong(self):
        """The indices of the misclassified images, in order of decreasing probability of the predicted class."""
        guesses = self.probabilities.argmax(1)
        indices = np.flatnonzero(guesses != self.labels)
        return indices[np.argsort(-self.probabilities[indices, guesses[indices]], kind="stable")].tolist()

    def image(self, i):
        """An image as an array, before any transform."""
        return np.asarray(self.images.source[i][0])


def file_of(path):
    """The checkpoint file for a path: best.pt if the path is a run's folder, else the path itself."""
    return RunFolder(path).best if Path(path).is_dir() else Path(path)


def load_trained(path, network=AugmentCNN):
    """Load the checkpoint of an augment run: a dict, with the options as attributes of "config", and a "genotype".

    path: see `file_of`; network: the class that the tensors must be of. All that the checkpoint holds is checked.
    Raises UserError if it is no such checkpoint.
    """
    path = file_of(path)
    try:
        checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an augment run's folder, or a checkpoint in it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != "augment":
        raise UserError(f"{path} is not a checkpoint of augment.py")
    check_contents(checkpoint, path, "augment")
    if "preprocessing" not in checkpoint["results"]:
        raise UserError(f"{path} was written by a version of augment.py that did not yet save how images are prepared")
    checkpoint["config"] = config = AugmentConfig.restored(checkpoint["config"], path)
    checkpoint["genotype"] = genotype = from_str(config.genotype)
    check_size(checkpoint, config, sum(map(len, (*genotype.normal, *genotype.reduce))), path)
    with torch.device("meta"):  # shapes without values
        found = state_misfit(checkpoint["keeps"].get("net", {}), network_of(checkpoint, network))
    size, channels = image_shape(config.dataset, config.image_size, config.image_channels)
    results = checkpoint["results"]
    if (results["input_size"], results["input_channels"]) != (size, channels):
        found = found or f"its images are not of {channels} x {size} x {size}"
    if found:
        raise UserError(f"{path} is not a checkpoint that this program wrote: {found}")
    return checkpoint


def network_of(checkpoint, network=AugmentCNN):
    """The network that a checkpoint of `load_trained` is of, with new weights. network: its class."""
    config, results = checkpoint["config"], checkpoint["results"]
    return network(
        results["input_size"],
        results["input_channels"],
        config.init_channels,
        len(results["classes"]),
        config.layers,
        config.aux_weight > 0,
        checkpoint["genotype"],
        stem=config.stem,
    )


def load_network(checkpoint, device):
    """The trained network of a checkpoint, an `AugmentCNN` in eval mode."""
    net = network_of(checkpoint)
    net.load_state_dict(checkpoint["keeps"]["net"])
    return net.to(device, memory_format=torch.channels_last).eval()


def start_from(net, checkpoint, classes):
    """Initialise a network with the weights of a checkpoint; the classifiers only if the classes are the same.

    classes: the class names of the new training. Raises UserError if other tensors are missing or of another shape.
    """
    saved, state = checkpoint["keeps"]["net"], net.state_dict()
    classifiers = {name for name in state if re.fullmatch(r"(aux_head\.)?linear\.(weight|bias)", name)}
    missing = {name for name in state if name not in saved or saved[name].shape != state[name].shape}
    errors = [name for name in state if name in missing - classifiers]
    if errors:
        raise ranks.user_error(
            f"--init-checkpoint is of another network: {len(errors)} of {len(state)} tensors are missing or of another "
            f"shape, first {errors[0]}"
        )
    kept = missing if checkpoint["results"]["classes"] == classes else classifiers
    net.load_state_dict({name: state[name] if name in kept else saved[name] for name in state})


def images_of(checkpoint, data_path=None):
    """The test images of a trained network, an `Images`, normalised as in its training; with --hold-out the held-out.

    data_path: their folder, if it is no longer that of the training. Raises UserError if they are not the same images.
    """
    results, config = checkpoint["results"], checkpoint["config"]
    options = {
        "dataset": config.dataset,
        "data_path": data_path or config.data_path,
        "mean_std": (results["mean"], results["std"]),
        "image_size": config.image_size,
        "image_channels": config.image_channels,
        "skip_bad_images": config.skip_bad_images,
        "crops": config.stem == "imagenet",
    }
    if config.hold_out:
        images = get_data(cutout_length=0, validation=True, hold_out=config.hold_out, **options)[4]
    else:
        images = get_test_data(**options)
    check_unchanged({measured_on(checkpoint): images}, results)
    classes = results["classes"]  # an older run has no fingerprint, so only these are compared
    if images.class_names(len(classes)) != classes:
        raise UserError(f"{config.dataset} has other classes than in training: they were {', '.join(classes)}")
    return images


def measured_on(checkpoint):
    """The images that the accuracy of a trained network is measured on: `test`, or with --hold-out `held-out`."""
    return "held-out" if checkpoint["config"].hold_out else "test"


@torch.no_grad()
def evaluate(path, data_path=None, batch_size=64, workers=0, device="auto", mirror=False):
    """The `Evaluation` of a trained network on its test or held-out images.

    path: a checkpoint, or a run's folder for its best.pt; mirror: average the probabilities of each image and its
    mirror image.
    """
    device = pick_device(device)
    checkpoint = load_trained(path)
    net, images = load_network(checkpoint, device), images_of(checkpoint, data_path)
    loader = Loader(images, range(len(images)), batch_size, device, workers, shuffle=False)
    probabilities = []
    for X, _, _ in loader.epoch(0):
        views = [X, X.flip(3)] if mirror else [X]
        probabilities.append(torch.stack([net(view)[0].float().softmax(1) for view in views]).mean(0).cpu())
    probabilities = torch.cat(probabilities)
    if not probabilities.isfinite().all():
        raise UserError(f"{file_of(path)}: the outputs of its network are not finite")
    return Evaluation(
        labels=np.asarray(images.labels),
        probabilities=probabilities.numpy(),
        names=checkpoint["results"]["classes"],
        images=images,
        checkpoint=str(file_of(path)),
        part=measured_on(checkpoint),
    )
