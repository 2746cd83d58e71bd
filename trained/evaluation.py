"""Trained networks: load them from checkpoints, run them on images, and start a training from them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from command_line.errors import UserError
from config import AugmentConfig
from genotypes import Genotype, from_str
from images.image_folder import ENDINGS, ImageFolder, images_below, listed
from images.loading import Images, Loader, check_unchanged
from machine import ranks
from machine.devices import pick_device
from models.augment_cnn import AugmentCNN
from preproc import data_transforms
from run.checkpoints import check_network, check_tensor, load_checkpoint
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

    @property
    def choice(self) -> str:
        """What is to be said about the accuracy of best.pt: the images that it was chosen on. Empty for other files."""
        return f", chosen for its accuracy on the {self.measured_on} images" if self.path.name == "best.pt" else ""

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
    """The predictions of a trained network for images.

    images_name: which images these are, `test`, `held-out`, or `other` if they are not those of the run; probabilities:
    (N, n_classes).
    """

    trained: TrainedNetwork
    images: Images
    images_name: str
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

    def describe(self) -> str:
        """The checkpoint and its accuracy, in words."""
        images = f"{len(self.images)} {self.images_name} images"
        return f"{self.trained.path}{self.trained.choice}: top 1 {self.top1:.2%} of {images}"


CLASSIFIERS = ("linear.weight", "linear.bias", "aux_head.linear.weight", "aux_head.linear.bias")


def file_of(path: str | Path) -> Path:
    """The checkpoint file for a path: the last checkpoint if the path is a run's folder, else the path itself."""
    return RunFolder(path).checkpoint if Path(path).is_dir() else Path(path)


def load_trained(path: str | Path, network: type[AugmentCNN] = AugmentCNN) -> TrainedNetwork:
    """Load a checkpoint of augment.py.

    path: see `file_of`; network: the class of the network. Raises UserError if the file is not such a checkpoint, or if
    the names, shapes and types of its tensors are not those of the network.
    """
    path = file_of(path)
    checkpoint = _content_of(path)
    if not _is_of_augment(checkpoint):
        raise UserError(f"{path} is not a checkpoint of augment.py")
    with reading(path):
        config = AugmentConfig.restored(checkpoint["config"], path)
        trained = TrainedNetwork(
            path, config, from_str(config.genotype), checkpoint["results"], checkpoint["parts"]["net"]
        )
        with torch.device("meta"):  # shapes without values
            check_network(trained.new_network(network), trained.tensors, path)
    return trained


def _content_of(path):
    try:
        return load_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an augment run's folder, or a checkpoint in it") from None


def _is_of_augment(checkpoint):
    return isinstance(checkpoint, dict) and checkpoint.get("stage") == "augment"


def load_network(trained: TrainedNetwork, device: torch.device) -> AugmentCNN:
    """The trained network, in eval mode."""
    net = trained.new_network()
    net.load_state_dict(trained.tensors)
    return net.to(device, memory_format=torch.channels_last).eval()


def initial_tensors(
    path: str | Path, net: AugmentCNN, genotype: Genotype, classes: list[str]
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors with which a training starts, by their names in `net.state_dict()`; and a description of them.

    path: a checkpoint of augment.py or a run's folder, see `file_of`, or a `state_dict` of another program, which may
    be the entry "state_dict" or "model" of a dict. From augment.py all tensors are taken, but those of the classifiers
    only if the classes are the same; from another program the tensors of the same name and shape. genotype, classes: of
    the new training.

    Raises UserError if a checkpoint of augment.py is of another network, or if there is no tensor to take.
    """
    path, state = file_of(path), net.state_dict()
    checkpoint = _content_of(path)
    if _is_of_augment(checkpoint):
        trained = load_trained(path, type(net))
        if trained.genotype != genotype:
            raise UserError("--init-checkpoint is of another network: its genotype is another")
        tensors, left_out = trained.tensors, () if trained.results["classes"] == classes else CLASSIFIERS
        taken = {name: tensor for name, tensor in tensors.items() if name in state and name not in left_out}
        for name, tensor in taken.items():
            check_tensor(tensor, state[name], f"--init-checkpoint is of another network: {name}")
    else:
        tensors = _tensors_in(checkpoint)
        taken = {name: t for name, t in tensors.items() if name in state and _fits(t, state[name])}
        if not taken:
            raise UserError(f"{path} has no tensor whose name and shape are those of a tensor of the network")
    words = f"{len(taken)} of {len(state)} tensors are from {path}"
    for description, names in (("not in it", state), ("not taken from it", tensors)):
        others = [name for name in names if name not in taken]
        if others:
            words += f"; {description}: {listed(others)}"
    return taken, words


def _fits(tensor, expected):
    return tensor.shape == expected.shape and tensor.is_floating_point() == expected.is_floating_point()


def _tensors_in(content):
    """The tensors of a `state_dict`, by name, without what `DataParallel` and `torch.compile` put in front of names."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items if isinstance(value, torch.Tensor) and not value.is_sparse}
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in tensors.items()}


def images_of(trained: TrainedNetwork, data_path: str | None = None) -> tuple[Images, str]:
    """The images that the accuracy of a trained network is measured on, normalised as in its training; and their name.

    data_path: a folder with the data set of the training, or with other images of the same classes. The name is `test`,
    `held-out`, or `other`. Raises UserError if the images have other classes, or if data_path is None and they are no
    longer those of the training.
    """
    config, results = trained.config, trained.results
    options = {
        "dataset": config.dataset,
        "data_path": data_path or config.data_path,
        "mean_std": (results["mean"], results["std"]),
        "crops": config.stem == "imagenet",
        **config.image_options(),
    }
    try:
        if config.hold_out:
            images = get_data(cutout_length=0, validation=True, hold_out=config.hold_out, **options)[4]
        else:
            images = get_test_data(**options)
        check_unchanged({trained.measured_on: images.fingerprint()}, results["data"])
        return images, trained.measured_on
    except UserError:
        if data_path in (None, config.data_path):
            raise
    images, classes = get_test_data(**options), results["classes"]
    names = images.class_names(1 + max(images.labels))
    if names != classes:
        raise UserError(f"{data_path} has the classes {listed(names)}, but the network has {listed(classes)}")
    return images, "other"


def evaluate(path: str | Path, data_path: str | None = None, **options) -> Evaluation:
    """Run a trained network on its test or held-out images, or on others.

    path: a checkpoint, or a run's folder for its last one; data_path: see `images_of`; options: see `probabilities_of`.
    """
    trained = load_trained(path)
    images, name = images_of(trained, data_path)
    return Evaluation(trained, images, name, probabilities_of(trained, images, **options))


def predict(path: str | Path, folder: str | Path, **options) -> list[tuple[str, str, float]]:
    """Classify the images in a folder and its subfolders: (path of the file, name of the class, probability) of each.

    path, options: as of `evaluate`. Raises UserError if there is no image, or one cannot be read.
    """
    trained = load_trained(path)
    if not Path(folder).is_dir():
        raise UserError(f"--predict {folder}: there is no such folder")
    files = [str(Path(folder, name)) for name in images_below(str(folder), "", [])]
    if not files:
        raise UserError(f"--predict {folder}: there is no image; files of images end in {' '.join(ENDINGS)}")
    config, results = trained.config, trained.results
    size, crops, mode = results["input_size"], config.stem == "imagenet", {1: "L", 3: "RGB"}[results["input_channels"]]
    labels = [0] * len(files)  # which are not known
    source = ImageFolder("", [], files, labels, None if crops else size, mode, config.resize)
    mean_std = results["mean"], results["std"]
    _, transform = data_transforms(config.dataset, 0, size, mean_std, crops, resize=config.resize)
    probabilities = probabilities_of(trained, Images(source, labels, transform, transform, seed=0), **options)
    names = [results["classes"][i] for i in probabilities.argmax(1)]
    return list(zip(files, names, probabilities.max(1).tolist()))


@torch.no_grad()
def probabilities_of(
    trained: TrainedNetwork, images: Images, batch_size=64, workers=0, device="auto", mirror=False
) -> np.ndarray:
    """The probability of each class for each image, (N, n_classes).

    mirror: average the probabilities of each image and its mirror image.
    """
    torch_device = pick_device(device)
    net = load_network(trained, torch_device)
    loader = Loader(images, range(len(images)), batch_size, torch_device, workers, shuffle=False)
    probabilities = []
    for X, _, _ in loader.epoch(0):
        views = [X, X.flip(3)] if mirror else [X]
        probabilities.append(torch.stack([net(view)[0].float().softmax(1) for view in views]).mean(0).cpu())
    return torch.cat(probabilities).numpy()


@torch.no_grad()
def confusion_of(net: AugmentCNN, loader: Loader, n_classes: int) -> np.ndarray:
    """The confusion matrix of a network for a loader's images, over all ranks; see `Evaluation.confusion`."""
    counts = 0.0
    net.eval()
    for X, y, n in loader.epoch(0):
        pairs = n_classes * y + net(X)[0].argmax(1)
        shares = torch.bincount(pairs, minlength=n_classes**2).double() / len(y)
        counts += n * ranks.average([ranks.row_weighted(shares, y)], y)[0]
    return counts.round().long().view(n_classes, n_classes).cpu().numpy()


def accuracy_by_class(confusion: np.ndarray, names: list[str]) -> list[str]:
    """A line for each class, with the accuracy on its images and their number, and one with the mean of these.

    confusion: see `Evaluation.confusion`; classes without images do not count in the mean.
    """
    totals = confusion.sum(1)
    accuracies = confusion.diagonal() / np.maximum(totals, 1)
    lines = [f"{accuracy:8.2%} of {n:5}  {name}" for accuracy, n, name in zip(accuracies, totals, names)]
    return [*lines, f"{accuracies[totals > 0].mean():8.2%} is the mean over classes"]
