"""Trained networks: load them from checkpoints, run them on images, and start a training from them."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from command_line.errors import UserError
from config import AugmentConfig
from genotypes import Genotype, from_str
from images.loading import Images, Loader, check_unchanged
from machine.devices import pick_device
from models.augment_cnn import AugmentCNN
from run.checkpoints import check_network, load_checkpoint
from run.folder import RunFolder, reading
from utils import get_data, get_test_data


@dataclass
class TrainedNetwork:
    """The content of a checkpoint of augment.py.

    path: the file; config: the options of the run; genotype: the cells; results: what the run saves beside tensors,
    such as "classes", "input_size", "mean" and "std"; tensors: the network's `state_dict`.
    """

    path: Path
    config: AugmentConfig
    genotype: Genotype
    results: dict
    tensors: dict

    @property
    def measured_on(self) -> str:
        """The images that the accuracy is measured on: `test`, or with --hold-out `held-out`."""
        return "held-out" if self.config.hold_out else "test"

    def new_network(self, network: type[AugmentCNN] = AugmentCNN) -> AugmentCNN:
        """The network with new weights. network: its class."""
        return network(
            self.results["input_size"],
            self.results["input_channels"],
            self.config.init_channels,
            len(self.results["classes"]),
            self.config.layers,
            self.config.aux_weight > 0,
            self.genotype,
            stem=self.config.stem,
        )


@dataclass
class Evaluation:
    """The predictions of a trained network for images. probabilities: (N, n_classes)."""

    trained: TrainedNetwork
    images: Images
    probabilities: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The most probable class of each image, (N,)."""
        return self.probabilities.argmax(1)

    @property
    def top1(self) -> float:
        """The accuracy, as a fraction."""
        return float((self.predictions == self.images.labels).mean())

    def confusion(self) -> np.ndarray:
        """The confusion matrix: the number of images by (true class, predicted class)."""
        from sklearn.metrics import confusion_matrix  # here, since it takes half a second

        return confusion_matrix(self.images.labels, self.predictions, labels=range(self.probabilities.shape[1]))

    def wrong(self) -> list[int]:
        """The indices of the misclassified images, in order of decreasing probability of the predicted class."""
        indices = np.flatnonzero(self.predictions != self.images.labels)
        return indices[np.argsort(-self.probabilities.max(1)[indices], kind="stable")].tolist()


def file_of(path: str | Path) -> Path:
    """The checkpoint file for a path: best.pt if the path is a run's folder, else the path itself."""
    return RunFolder(path).best if Path(path).is_dir() else Path(path)


def load_trained(path: str | Path, network: type[AugmentCNN] = AugmentCNN) -> TrainedNetwork:
    """Load a checkpoint of augment.py.

    path: see `file_of`; network: the class of the network. Raises UserError if the file is not such a checkpoint, or if
    the names, shapes and types of its tensors are not those of the network.
    """
    path = file_of(path)
    try:
        checkpoint = load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an augment run's folder, or a checkpoint in it") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != "augment":
        raise UserError(f"{path} is not a checkpoint of augment.py")
    with reading(path):
        config = AugmentConfig.restored(checkpoint["config"], path)
        trained = TrainedNetwork(
            path, config, from_str(config.genotype), checkpoint["results"], checkpoint["parts"]["net"]
        )
        with torch.device("meta"):  # shapes without values
            check_network(trained.new_network(network), trained.tensors, path)
    return trained


def load_network(trained: TrainedNetwork, device: torch.device) -> AugmentCNN:
    """The trained network, in eval mode."""
    net = trained.new_network()
    net.load_state_dict(trained.tensors)
    return net.to(device, memory_format=torch.channels_last).eval()


def start_from(net: AugmentCNN, trained: TrainedNetwork, classes: list[str]) -> None:
    """Initialise a network with trained weights; the classifiers only if the classes are the same.

    classes: the class names of the new training. Raises UserError if other tensors are missing or of another shape.
    """
    saved, state = trained.tensors, net.state_dict()
    classifiers = {name for name in state if re.fullmatch(r"(aux_head\.)?linear\.(weight|bias)", name)}
    other = [name for name in state if name not in saved or saved[name].shape != state[name].shape]
    errors = [name for name in other if name not in classifiers]
    if errors:
        raise UserError(
            f"--init-checkpoint is of another network: {len(errors)} of {len(state)} tensors are missing or of another "
            f"shape, first {errors[0]}"
        )
    new = other if trained.results["classes"] == classes else classifiers
    net.load_state_dict({name: state[name] if name in new else saved[name] for name in state})


def images_of(trained: TrainedNetwork, data_path: str | None = None) -> Images:
    """The images that the accuracy of a trained network is measured on, normalised as in its training.

    data_path: their folder, if it is no longer that of the training. Raises UserError if they are not the same images.
    """
    config, results = trained.config, trained.results
    options = {
        "dataset": config.dataset,
        "data_path": data_path or config.data_path,
        "mean_std": (results["mean"], results["std"]),
        "image_size": config.image_size,
        "image_channels": config.image_channels,
        "resize": config.resize,
        "skip_bad_images": config.skip_bad_images,
        "crops": config.stem == "imagenet",
    }
    if config.hold_out:
        images = get_data(cutout_length=0, validation=True, hold_out=config.hold_out, **options)[4]
    else:
        images = get_test_data(**options)
    check_unchanged({trained.measured_on: images.fingerprint()}, results["data"])
    return images


@torch.no_grad()
def evaluate(
    path: str | Path,
    data_path: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    mirror: bool = False,
) -> Evaluation:
    """Run a trained network on its test or held-out images.

    path: a checkpoint, or a run's folder for its best.pt; mirror: average the probabilities of each image and its
    mirror image.
    """
    torch_device, trained = pick_device(device), load_trained(path)
    net, images = load_network(trained, torch_device), images_of(trained, data_path)
    loader = Loader(images, range(len(images)), batch_size, torch_device, workers, shuffle=False)
    probabilities = []
    for X, _, _ in loader.epoch(0):
        views = [X, X.flip(3)] if mirror else [X]
        probabilities.append(torch.stack([net(view)[0].float().softmax(1) for view in views]).mean(0).cpu())
    return Evaluation(trained, images, torch.cat(probabilities).numpy())


def accuracy_by_class(confusion: np.ndarray, names: list[str]) -> list[str]:
    """A line for each class: the accuracy on its images, and their number. confusion: see `Evaluation.confusion`."""
    lines = []
    for name, row, n_right in zip(names, confusion, confusion.diagonal()):
        lines.append(f"{n_right / max(row.sum(), 1):8.2%} of {row.sum():5}  {name}")
    return lines
