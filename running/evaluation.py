"""Trained networks: loaded from checkpoints, run on their test images, and used to start another training."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import AugmentConfig
from genotypes import from_str
from models.augment_cnn import AugmentCNN
from running import ranks
from running.checkpoints import load_checkpoint
from running.devices import pick_device
from running.errors import UserError
from running.folder import RunFolder
from running.loading import Images, Loader, check_unchanged
from utils import get_test_data


@dataclass
class Evaluation:
    """What a network predicts for the test images.

    labels: (N,) true classes; probabilities: (N, n_classes); names: of the classes; images: an `Images`; checkpoint:
    the file that the network was loaded from.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    names: list
    images: Images
    checkpoint: str

    @property
    def top1(self):
        return float((self.probabilities.argmax(1) == self.labels).mean())

    def confusion(self):
        """Counts, (true class, predicted class)."""
        counts = np.zeros((len(self.names), len(self.names)), dtype=int)
        np.add.at(counts, (self.labels, self.probabilities.argmax(1)), 1)
        return counts

    def wrong(self):
        """The indices of the images that were predicted wrongly, the largest probability first."""
        guesses = self.probabilities.argmax(1)
        indices = np.flatnonzero(guesses != self.labels)
        return indices[np.argsort(-self.probabilities[indices, guesses[indices]], kind="stable")].tolist()

    def image(self, i):
        """A test image before any transform, an array."""
        return np.asarray(self.images.source[i][0])


def file_of(path):
    """The file that a user means by a path to a checkpoint, or to a run's folder, whose best is meant."""
    return RunFolder(path).best if Path(path).is_dir() else Path(path)


def load_trained(path):
    """The checkpoint of an augment run: a file, or the best in a run's folder. Raises UserError if it is not one."""
    path = file_of(path)
    try:
        checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an augment run's folder, or a checkpoint in it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != "augment":
        raise UserError(f"{path} is not a checkpoint of augment.py")
    if "preprocessing" not in checkpoint["results"]:
        raise UserError(f"{path} was written by a version of augment.py that did not yet save how images are prepared")
    return checkpoint


def load_network(checkpoint, device):
    """The trained network of a checkpoint, ready for inference."""
    config, state, results = checkpoint["config"], checkpoint["keeps"]["net"], checkpoint["results"]
    net = AugmentCNN(
        results["input_size"],
        results["input_channels"],
        config["init_channels"],
        len(state["linear.bias"]),
        config["layers"],
        config["aux_weight"] > 0,
        from_str(config["genotype"]),
        stem=config.get("stem", "cifar"),
    )
    net.load_state_dict(state)
    return net.to(device, memory_format=torch.channels_last).eval()


def start_from(net, checkpoint, classes):
    """Load a checkpoint's weights into a network of the same cells; its classifiers only if the classes are the same.

    classes: the names of those that the network is to tell apart. Raises UserError, naming what doesn't fit.
    """
    saved, state = checkpoint["keeps"]["net"], net.state_dict()
    classifiers = {name for name in state if re.fullmatch(r"(aux_head\.)?linear\.(weight|bias)", name)}
    missing = {name for name in state if name not in saved or saved[name].shape != state[name].shape}
    others = [name for name in state if name in missing - classifiers]
    if others:
        raise ranks.user_error(
            f"--init-checkpoint is of another network: {len(others)} of {len(state)} tensors are missing or of another "
            f"shape, first {others[0]}"
        )
    kept = missing if checkpoint["results"]["classes"] == classes else classifiers
    net.load_state_dict({name: state[name] if name in kept else saved[name] for name in state})


def images_of(checkpoint, data_path=None):
    """The `Images` that a trained network was tested on, normalised as in its training.

    data_path: where they are, if no longer where they were. Raises UserError where they are not the same.
    """
    results, saved = checkpoint["results"], checkpoint["config"]
    config = AugmentConfig(["--genotype", saved["genotype"]])
    vars(config).update(saved)
    images = get_test_data(
        config.dataset,
        data_path or config.data_path,
        mean_std=(results["mean"], results["std"]),
        image_size=config.image_size,
        image_channels=config.image_channels,
        skip_bad_images=config.skip_bad_images,
        crops=config.stem == "imagenet",
        hold_out_by_name="data" in results,  # older runs chose their test images otherwise
    )
    check_unchanged({"test": images}, results)
    classes = results["classes"]  # of an older run they are all that is known
    if images.class_names(len(classes)) != classes:
        raise UserError(f"{config.dataset} has other classes than in training: they were {', '.join(classes)}")
    return images


@torch.no_grad()
def evaluate(path, data_path=None, batch_size=64, workers=0, device="auto", mirror=False):
    """The `Evaluation` of an augment run's folder (its best network) or a checkpoint, on its data set's test images.

    mirror: average the probabilities of each image and its mirror image.
    """
    device = pick_device(device)
    checkpoint = load_trained(path)
    net, images = load_network(checkpoint, device), images_of(checkpoint, data_path)
    loader = Loader(images, range(len(images)), batch_size, device, workers, shuffle=False)
    probabilities = []
    for X, _, _ in loader.epoch(0):
        views = [X, X.flip(3)] if mirror else [X]
        probabilities.append(torch.stack([net(view)[0].float().softmax(1) for view in views]).mean(0).cpu())
    return Evaluation(
        labels=np.asarray(images.labels),
        probabilities=torch.cat(probabilities).numpy(),
        names=checkpoint["results"]["classes"],
        images=images,
        checkpoint=str(file_of(path)),
    )
