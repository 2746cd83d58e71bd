"""A trained network on its test images."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import AugmentConfig
from genotypes import from_str
from models.augment_cnn import AugmentCNN
from running import ranks
from running.checkpoints import BEST, load_checkpoint
from running.errors import UserError
from running.loading import Images, Loader
from running.run import pick_device
from utils import get_data


@dataclass
class Evaluation:
    """What a network says of the test images.

    labels: (N,) true classes; probabilities: (N, n_classes); names: the classes'; images: an `Images`; checkpoint: the
    file that the network is from.
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
        """The mistaken images' indices, the surest mistake first."""
        guesses = self.probabilities.argmax(1)
        indices = np.flatnonzero(guesses != self.labels)
        return indices[np.argsort(-self.probabilities[indices, guesses[indices]], kind="stable")].tolist()

    def image(self, i):
        """A test image as it came, an array."""
        return np.asarray(self.images.source[i][0])


def file_of(path):
    """The checkpoint that a user means by a path: this file, or the best of a run's folder."""
    return Path(path) / BEST if Path(path).is_dir() else Path(path)


def load_trained(path):
    """The checkpoint of an augment run: a file, or a folder's best. Raises UserError where it is not one."""
    path = file_of(path)
    try:
        checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an augment run's folder, or a checkpoint in it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != "augment":
        raise UserError(f"{path} is not a checkpoint of augment.py")
    if "preprocessing" not in checkpoint["results"]:
        raise UserError(f"{path} was written by a version of augment.py that noted too little of the images")
    return checkpoint


def load_network(checkpoint, device):
    """The trained network of a checkpoint, ready for inference."""
    config, state, about = checkpoint["config"], checkpoint["keeps"]["net"], checkpoint["results"]
    size, channels, n_classes = about["input_size"], about["input_channels"], len(state["linear.bias"])
    net = AugmentCNN(
        size, channels, config["init_channels"], n_classes, config["layers"], config["aux_weight"] > 0,
        from_str(config["genotype"]), stem=config.get("stem", "cifar"),
    )  # fmt: skip
    net.load_state_dict(state)
    return net.to(device, memory_format=torch.channels_last).eval()


def start_from(net, checkpoint):
    """Load a checkpoint's weights into a network of the same cells; classifiers of other classes are left as they are.

    Raises UserError, naming what doesn't fit.
    """
    state, own = checkpoint["keeps"]["net"], net.state_dict()
    left = [name for name in own if name not in state or state[name].shape != own[name].shape]
    others = [name for name in left if not re.fullmatch(r"(aux_head\.)?linear\.(weight|bias)", name)]
    if others:
        raise ranks.user_error(
            f"--init-checkpoint is of another network: {len(others)} of {len(own)} tensors are missing or of another "
            f"shape, first {others[0]}"
        )
    net.load_state_dict({name: own[name] if name in left else state[name] for name in own})


def images_of(checkpoint, data_path=None):
    """The `Images` that a trained network was tested on, normalised as it knows them.

    data_path: where they are, if no longer where they were. Raises UserError where they are of other classes.
    """
    about = checkpoint["results"]
    config = AugmentConfig(["--genotype", checkpoint["config"]["genotype"]])
    vars(config).update(checkpoint["config"])
    *_, n_classes, _, images = get_data(
        config.dataset, data_path or config.data_path, 0, validation=True, image_size=config.image_size,
        image_channels=config.image_channels, skip_bad_images=config.skip_bad_images,
        crops=config.stem == "imagenet", mean_std=(about["mean"], about["std"]),
    )  # fmt: skip
    if images.class_names(n_classes) != about["classes"]:
        raise UserError(f"{config.dataset} has other classes than in training: they were {', '.join(about['classes'])}")
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
    names = checkpoint["results"]["classes"]
    return Evaluation(np.asarray(images.labels), torch.cat(probabilities).numpy(), names, images, str(file_of(path)))
