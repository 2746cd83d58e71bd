"""The options of search.py and augment.py, with their defaults; run/options.py has those of every run."""

import argparse
import dataclasses
from dataclasses import dataclass

from command_line.errors import UserError
from genotypes import GenotypeError, resolve
from images.data_sets import DATASETS
from images.image_folder import RESIZES
from models.choices import EXECUTIONS, PRIMITIVES, SEARCH_SPACES, STEMS
from models.spaces import SPACES, Space, space_of
from run.options import (
    Options,
    RunOptions,
    in_a_shell,
    natural,
    nonnegative,
    number,
    option,
    option_name,
    path,
    positive,
    positive_int,
    probability,
)

# DARTS-ES (evidence/search_state.py) compares means of the eigenvalue over WINDOW epochs, and in the authors' code
# FIRST_RETURNED is the first epoch whose genotype can be returned.
WINDOW = 5
FIRST_RETURNED = 10


def primitives(text: str) -> list[str]:
    """A type: operations, and search spaces for all of their operations, with commas between them."""
    names = [name for word in text.split(",") for name in SEARCH_SPACES.get(word, [word])]
    if not set(names) <= set(PRIMITIVES):
        from models.ops import OPS  # slow, since it imports torch; has also the operations that a user's script adds

        for name in names:
            if name not in OPS:
                raise argparse.ArgumentTypeError(
                    f"unknown operation {name!r}; give some of {', '.join(OPS)}, or of the search spaces "
                    f"{', '.join(SEARCH_SPACES)}, with commas and without spaces"
                )
    if len(set(names)) < len(names) or names == ["none"]:
        raise argparse.ArgumentTypeError(f"must be different operations, at least one other than none, not {text!r}")
    return names


def betas(text: str) -> list[float]:
    """A type: two numbers with a comma between them."""
    try:
        first, second = map(probability, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers with a comma between them, not {text!r}") from None
    return [first, second]


def augmentation(text: str) -> str:
    """A type: names of augmentations, with + between them."""
    from preproc import AUGMENTATIONS  # slow, since it imports torch

    for name in text.split("+"):
        if name not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(
                f"unknown augmentation {name!r}; give some of {', '.join(AUGMENTATIONS)}, with + between them"
            )
    return text


def check_layers(layers: int, space: Space):
    """Raise UserError if a kind of cell would be missing."""
    if layers < space.min_layers:
        raise UserError(
            f"--layers {layers}: must be at least {space.min_layers}, since with fewer cells none is a "
            f"{space.kinds[0]} one"
        )


@dataclass(init=False)
class DataOptions(Options):
    """The options that choose and load the images."""

    dataset: str = option("digits", "data set", group="data", choices=list(DATASETS))
    data_path: str = option("data", "folder in which data sets are, or into which they are downloaded", path)
    image_size: int = option(32, "height and width, in pixels, of images of the data set folder", number(int, 8, 8192))
    image_channels: int = option(3, "channels of images of the data set folder: grey or colour", int, choices=(1, 3))
    resize: str = option(
        "crop",
        "how an image of the data set folder becomes a square: crop takes its middle, squeeze scales all of it",
        choices=RESIZES,
    )
    augmentation: str | None = option(
        None,
        "random changes of the training images: none, or names such as crop+flip; docs/data.md lists them (default: "
        "those of the data set)",
        augmentation,
    )
    skip_bad_images: bool = option(False, "leave out the images of the data set folder that cannot be read")
    workers: int = option(2, "number of processes that load images, for each rank; 0: the run itself", natural)

    def check(self):
        super().check()
        if self.dataset != "folder":
            names = ("image_size", "image_channels", "resize", "skip_bad_images")
            self.refuse_without_effect(names, f"with --dataset {self.dataset}, but only with --dataset folder")
        if self.dataset == "digits":
            self.refuse_without_effect(("data_path",), "with --dataset digits (for your images: --dataset folder)")

    def image_options(self) -> dict:
        """How `get_data` is to read the images of the data set `folder`."""
        return {name: getattr(self, name) for name in ("image_size", "image_channels", "resize", "skip_bad_images")}

    def data_options(self) -> str:
        """The options that select the same images, as a command line."""
        names = [field.name for field in dataclasses.fields(DataOptions) if field.name not in ("dataset", "workers")]
        return in_a_shell({"dataset": self.dataset} | self.changed(names))


@dataclass(init=False)
class SearchConfig(DataOptions, RunOptions):
    """Search for a cell: DARTS, first or second order."""

    stage = "search"

    space: str = option(
        "darts",
        "search space; with nas-bench-201 defaults differ, and --layers is the number of cells in each of three stages",
        group="network",
        choices=SPACES,
    )
    layers: int = option(8, "number of cells, at least 3", positive_int)
    init_channels: int = option(16, "channels of the first cells", positive_int)
    nodes: int = option(4, "number of nodes in a cell", positive_int)
    primitives: list[str] = option(  # noqa: RUF009
        PRIMITIVES,
        "candidates on every edge: operations with commas between them, such as skip_connect,sep_conv_3x3; or all of "
        f"{', '.join(SEARCH_SPACES)} (default: all of the space)",
        primitives,
    )
    execution: str = option("fused", "how cells are computed: fused is fast, plain the definition", choices=EXECUTIONS)
    recompute: bool = option(False, "compute the inside of a cell again in the backward pass, to need less memory")
    cuda_graphs: str = option(
        "auto",
        "auto: a single GPU records the kernels of a step once an epoch, and replays them",
        choices=("auto", "off"),
    )

    epochs: int = option(50, "number of epochs", positive_int, "search")
    batch_size: int = option(64, "images per step from each half of the data, summed over ranks", positive_int)
    order: str = option(
        "second", "gradient of alpha: eq. 6, or the faster one with xi = 0", choices=("first", "second")
    )
    eps_scale: float = option(0.01, "length of the shift of w in eq. 7, in second order", positive)
    w_lr: float = option(0.025, "learning rate of w at the start", positive)
    w_lr_min: float = option(0.001, "learning rate of w at the end of the cosine", nonnegative)
    w_momentum: float = option(0.9, "momentum of w's SGD", probability)
    w_nesterov: bool = option(False, "use Nesterov's momentum for w")
    w_weight_decay: float = option(3e-4, "weight decay of w's SGD", nonnegative)
    w_grad_clip: float = option(5.0, "norm to which w's gradient is clipped", positive)
    alpha_lr: float = option(3e-4, "learning rate of alpha's Adam; 0: only w learns", nonnegative)
    alpha_betas: list[float] = option([0.5, 0.999], "beta 1 and beta 2 of alpha's Adam (default: 0.5,0.999)", betas)  # noqa: RUF009
    alpha_weight_decay: float = option(1e-3, "weight decay of alpha's Adam", nonnegative)
    early_stop: bool = option(False, "end by the rule of DARTS-ES, with the genotype from before the eigenvalue grew")
    select: str = option(
        "magnitude",
        "how the genotype is chosen at the end: by the weights of operations, or by the accuracy lost without each",
        choices=("magnitude", "perturbation"),
    )
    tune_epochs: int = option(5, "epochs in which w learns between two decisions of --select perturbation", natural)
    eigenvalue_images: int = option(8, "validation images for the eigenvalue of each epoch; 0: not computed", natural)
    variant: str | None = option(
        None,
        "published variant of DARTS, or several such as pc-darts,beta-darts; docs/variants.md lists them, and "
        "--variant NAME --help the options of one",
    )

    @classmethod
    def default_values(cls, given):
        return super().default_values(given) | SPACES[given.get("space", "darts")].defaults.get("search", {})

    @classmethod
    def groups(cls, given):
        groups = super().groups(given)
        if given.get("variant") is not None:
            from variants import named  # here, since it imports torch, which takes seconds

            for name, kind in named(given["variant"]).items():
                groups[f"variant {name}"] = dataclasses.fields(kind)
        return groups

    @classmethod
    def about_unknown(cls, word):
        from variants import VARIANTS  # here, since it imports torch, which takes seconds

        for name, kind in VARIANTS.items():
            if any(word.partition("=")[0] == f"--{option_name(field.name)}" for field in dataclasses.fields(kind)):
                return f"{word} is an option of --variant {name}"
        return super().about_unknown(word)

    def check(self):
        super().check()
        space = SPACES[self.space]
        check_layers(self.layers, space)
        if space.is_fixed:
            self.refuse_without_effect(("nodes",), f"with --space {space.name}")
            if not set(self.primitives) <= set(space.primitives):
                raise UserError(f"--primitives: --space {space.name} has {', '.join(space.primitives)}")
        if self.select == "magnitude":
            self.refuse_without_effect(("tune_epochs",), "without --select perturbation")
            if self.alpha_lr == 0:
                raise UserError("--alpha-lr 0 needs --select perturbation, since alphas stay random")
        if self.order == "first":
            self.refuse_without_effect(("eps_scale",), "with --order first")
        if self.early_stop:
            if not self.eigenvalue_images:
                raise UserError("--early-stop needs the eigenvalue, so --eigenvalue-images of at least 1")
            needed = FIRST_RETURNED + WINDOW + WINDOW // 2 + getattr(self, "pc_warm_up", 0)
            if self.epochs < needed:
                self.refuse_without_effect(("early_stop",), f"in fewer than {needed} epochs")


# The defaults with --stem imagenet: DARTS, appendix A.2.3
IMAGENET = {
    "layers": 14,
    "init_channels": 48,
    "epochs": 250,
    "batch_size": 128,
    "lr": 0.1,
    "lr_decay": 0.97,
    "weight_decay": 3e-5,
    "label_smoothing": 0.1,
    "drop_path_prob": 0.0,
    "cutout_length": 0,
    "image_size": 224,
}


@dataclass(init=False)
class AugmentConfig(DataOptions, RunOptions):
    """Train the network that a genotype makes, from scratch."""

    stage = "augment"

    genotype: str | None = option(
        None,
        "cells of the network: a published one such as DARTS_V2, random:SEED, a string 'Genotype(...)', JSON, a file "
        "of these, or the folder of a search; '|nor_conv_3x3~0|+...' is a cell of NAS-Bench-201, which has other "
        "defaults",
        path,
        "network",
    )
    stem: str = option("cifar", "first layers; imagenet: for 64 pixels and up, and with other defaults", choices=STEMS)
    layers: int = option(20, "number of cells, at least 3", positive_int)
    init_channels: int = option(36, "channels of the first cells", positive_int)
    execution: str = option("fused", "how cells are computed: fused is fast, plain the definition", choices=EXECUTIONS)

    evaluate: str | None = option(
        None,
        "run (its last checkpoint), or checkpoint, whose accuracy is printed, overall and by class",
        path,
        "evaluation, without training",
    )
    predict: str | None = option(None, "with --evaluate: folder of images whose predicted classes are printed", path)
    mirror: bool = option(False, "average the predictions for each image and its mirror image")

    init_checkpoint: str | None = option(
        None, "run, checkpoint, or state_dict whose weights are taken at the start", path, "training"
    )
    epochs: int = option(600, "number of epochs", positive_int)
    hold_out: float = option(0.0, "fraction of the training images to measure on, and not to train on", probability)
    batch_size: int = option(96, "images per step, summed over ranks", positive_int)
    lr: float = option(0.025, "learning rate at the start", positive)
    lr_decay: float | None = option(
        None,
        "factor of the learning rate after each epoch (default: a cosine to zero)",
        number(float, 0, 1, low_open=True),
    )
    label_smoothing: float = option(0.0, "probability that is spread evenly over all classes", probability)
    momentum: float = option(0.9, "momentum of SGD", probability)
    nesterov: bool = option(False, "use Nesterov's momentum")
    weight_decay: float = option(3e-4, "weight decay of SGD", nonnegative)
    grad_clip: float = option(5.0, "norm to which the gradient is clipped; 0: it is not", nonnegative)
    aux_weight: float = option(0.4, "weight of the auxiliary head's loss; 0: no such head", nonnegative)
    cutout_length: int = option(16, "side in pixels of the square cut out of an image, at most half of it", natural)
    drop_path_prob: float = option(0.2, "probability of drop path at the end, linear from 0", probability)

    @classmethod
    def default_values(cls, given):
        defaults = super().default_values(given)
        if given.get("stem") == "imagenet":
            return defaults | IMAGENET
        if given.get("evaluate") is not None:
            return defaults | {"data_path": None}  # that of the training
        return defaults | cls.space_of_genotype(given.get("genotype")).defaults.get("augment", {})

    @staticmethod
    def space_of_genotype(text: str | None) -> Space:
        """The search space that a genotype belongs to; DARTS's if it cannot be read; augment.py will tell why."""
        try:
            return space_of(resolve(text)) if text else SPACES["darts"]
        except GenotypeError:
            return SPACES["darts"]

    def check(self):
        if self.evaluate is not None:
            used = {"evaluate", "predict", "mirror", "data_path", "batch_size", "workers", "device"}
            return self.refuse_without_effect(sorted(vars(self).keys() - used), "with --evaluate")
        super().check()
        if self.genotype is None:
            raise UserError("--genotype is required")
        space = self.space_of_genotype(self.genotype)
        check_layers(self.layers, space)
        if not space.has_auxiliary_head:
            names = ("stem", "aux_weight", "drop_path_prob")
            self.refuse_without_effect(names, f"in networks of {space.name}")
        self.refuse_without_effect(("mirror", "predict"), "without --evaluate")

    @property
    def measured_on(self) -> str:
        """The images that accuracy is measured on: `test`, or with --hold-out `held-out`."""
        return "held-out" if self.hold_out else "test"
