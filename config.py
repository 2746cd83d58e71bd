"""All options of search.py and augment.py, with their defaults."""

import argparse

from images.data_sets import DATASETS
from models.choices import EXECUTIONS, PRIMITIVES, SEARCH_SPACES, STEMS, VARIANTS
from run.options import (
    MAY_CHANGE,
    RunOptions,
    folder_name,
    gpus,
    natural,
    nonnegative,
    number,
    option_name,
    positive,
    positive_int,
    probability,
)


def _primitives(text):
    """An argparse type: operations and search spaces, separated by commas. Returns operations with commas."""
    names = [name for word in text.split(",") for name in SEARCH_SPACES.get(word, [word])]
    if not set(names) <= set(PRIMITIVES):
        from models.ops import OPS  # slow, since it imports torch; has also the operations that a user's script adds

        unknown = [name for name in names if name not in OPS]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown operation {unknown[0][:50]!r}; give some of {', '.join(OPS)}, or of the search spaces "
                f"{', '.join(SEARCH_SPACES)}, with commas and without spaces"
            )
    if len(set(names)) < len(names) or names == ["none"]:
        raise argparse.ArgumentTypeError(f"must be different operations, at least one other than none, not {text!r}")
    return ",".join(names)


def _variants(text):
    """An argparse type: names of variants, with commas, that change different things."""
    names, changed_by = text.split(","), {}
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"names a variant twice: {text!r}")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(
                f"unknown variant {name!r}; give some of {', '.join(VARIANTS)}, with commas"
            )
        for change in sorted(VARIANTS[name]):
            if change in changed_by:
                raise argparse.ArgumentTypeError(
                    f"{changed_by[change]} and {name} can't be combined: both change {change}"
                )
            changed_by[change] = name
    return text


class SearchConfig(RunOptions):
    """Search for a cell: DARTS, first or second order."""

    stage = "search"

    @staticmethod
    def check(parser, options):
        if options.early_stop and not options.eigenvalue_images:
            parser.error("--early-stop needs the eigenvalue, so --eigenvalue-images of at least 1")

    @staticmethod
    def add_options(parser):
        group = parser.add_argument_group("network")
        group.add_argument("--layers", type=positive_int, default=8, metavar="N", help="cells")
        group.add_argument("--init-channels", type=positive_int, default=16, metavar="C", help="of the first cells")
        group.add_argument("--nodes", type=positive_int, default=4, metavar="N", help="nodes of a cell")
        group.add_argument(
            "--primitives",
            type=_primitives,
            default="darts",
            metavar="OPS",
            help="candidates on every edge: operations with commas, as skip_connect,sep_conv_3x3; or search spaces, of "
            + ", ".join(SEARCH_SPACES),
        )
        _add_execution(group)
        group.add_argument(
            "--recompute",
            action="store_true",
            help="compute what a cell has inside again for the backward pass, to need less memory",
        )
        group.add_argument(
            "--cuda-graphs",
            default="auto",
            choices=("auto", "off"),
            help="auto: on one GPU, without --sync-bn, record a step's kernels once an epoch and replay them",
        )

        group = parser.add_argument_group("search")
        group.add_argument("--epochs", type=positive_int, default=50, metavar="N", help="epochs")
        group.add_argument(
            "--batch-size", type=positive_int, default=64, metavar="N", help="images a step and half, over all ranks"
        )
        group.add_argument(
            "--order",
            default="second",
            choices=("first", "second"),
            help="second: alpha's gradient through a virtual step of w (eq. 6); first: at w itself (xi = 0), faster",
        )
        group.add_argument(
            "--eps-scale", type=positive, default=0.01, metavar="E", help="second order: length of eq. 7's shift of w"
        )
        group.add_argument("--w-lr", type=positive, default=0.025, metavar="LR", help="weights: learning rate")
        group.add_argument(
            "--w-lr-min", type=nonnegative, default=0.001, metavar="LR", help="weights: at the end of the cosine"
        )
        group.add_argument("--w-momentum", type=probability, default=0.9, metavar="M", help="weights: SGD's momentum")
        group.add_argument("--w-weight-decay", type=nonnegative, default=3e-4, metavar="D", help="weights: SGD's decay")
        group.add_argument("--w-grad-clip", type=positive, default=5.0, metavar="NORM", help="weights: largest norm")
        group.add_argument("--alpha-lr", type=positive, default=3e-4, metavar="LR", help="alphas: Adam's learning rate")
        group.add_argument(
            "--alpha-weight-decay", type=nonnegative, default=1e-3, metavar="D", help="alphas: Adam's decay"
        )
        group.add_argument(
            "--early-stop",
            action="store_true",
            help="stop when the dominant eigenvalue of the Hessian of L_val in alpha has grown, and take the genotype "
            "of 5 epochs before (DARTS-ES)",
        )
        group.add_argument(
            "--eigenvalue-images",
            type=natural,
            default=8,
            metavar="N",
            help="validation images that this eigenvalue is computed on after each epoch, fewer of large ones; 0: none",
        )

        group = parser.add_argument_group("variants of DARTS")
        group.add_argument(
            "--variant",
            type=_variants,
            metavar="NAMES",
            help="one, or several with commas: " + ", ".join(VARIANTS),
        )
        group.add_argument(
            "--pc-share", type=positive_int, default=4, metavar="K", help="pc-darts: 1/K of the channels are searched"
        )
        group.add_argument(
            "--pc-edge-normalisation", default="on", choices=("on", "off"), help="pc-darts: weigh a node's edges too"
        )
        group.add_argument(
            "--pc-warm-up", type=natural, default=15, metavar="N", help="pc-darts: epochs before alphas learn"
        )
        group.add_argument(
            "--beta-strength",
            type=nonnegative,
            default=50.0,
            metavar="L",
            help="beta-darts: factor that the penalty grows to",
        )
        group.add_argument(
            "--minus-strength",
            type=nonnegative,
            default=1.0,
            metavar="B",
            help="darts-minus: weight of the auxiliary skip connections at the start",
        )
        group.add_argument(
            "--fair-strength",
            type=nonnegative,
            default=10.0,
            metavar="W",
            help="fair-darts: weight of the zero-one loss",
        )
        group.add_argument(
            "--fair-threshold",
            type=probability,
            default=0.85,
            metavar="P",
            help="fair-darts: weight that an operation must have to enter the genotype",
        )
        for name, first, last in (("gdas", 10.0, 0.1), ("snas", 1.0, 0.03)):
            for suffix, default, when in (("", first, "first epoch"), ("-end", last, "last epoch, linear in between")):
                group.add_argument(
                    f"--{name}-temperature{suffix}",
                    type=positive,
                    default=default,
                    metavar="T",
                    help=f"{name}: temperature of the draws in the {when}",
                )
        group.add_argument(
            "--drnas-kl-strength",
            type=nonnegative,
            default=0.0,
            metavar="L",
            help="drnas: of the KL divergence to the start; 0: the distance is that of --alpha-weight-decay",
        )
        group.add_argument(
            "--sdarts-radius",
            type=nonnegative,
            default=0.3,
            metavar="E",
            help="sdarts: radius within which weights are perturbed; it grows from 0.03 to this",
        )
        _add_data_and_run(parser, "search")


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


class AugmentConfig(RunOptions):
    """Train the network that a genotype makes, from scratch."""

    stage = "augment"

    @staticmethod
    def check(parser, options):
        if options.genotype is None and options.evaluate is None:
            parser.error("--genotype is required")

    @property
    def measured_on(self):
        """The images that accuracy is measured on: `test`, or with --hold-out `held-out`."""
        return "held-out" if self.hold_out else "test"

    @staticmethod
    def set_defaults(parser, words):
        stem = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        stem.add_argument("--stem", nargs="?")
        if stem.parse_known_args(words)[0].stem == "imagenet":
            parser.set_defaults(**IMAGENET)

    @staticmethod
    def add_options(parser):
        group = parser.add_argument_group("network")
        group.add_argument(
            "--genotype",
            metavar="G",
            help="a published cell as DARTS_V2, random:SEED, a string 'Genotype(...)', JSON, a file of these, or a "
            "search's folder",
        )
        group.add_argument(
            "--stem",
            default="cifar",
            choices=STEMS,
            help="imagenet: for images of 64 pixels and up, with the paper's settings for ImageNet as the defaults",
        )
        group.add_argument("--layers", type=positive_int, default=20, metavar="N", help="cells")
        group.add_argument("--init-channels", type=positive_int, default=36, metavar="C", help="of the first cells")
        _add_execution(group)

        group = parser.add_argument_group("evaluation, without training")
        group.add_argument(
            "--evaluate",
            metavar="CKPT",
            help="print the test accuracy, overall and by class, of this checkpoint, or of a run's best; of the other "
            "options --data-path, --batch-size, --workers and --device count",
        )
        group.add_argument("--mirror", action="store_true", help="average over each image and its mirror image")

        group = parser.add_argument_group("training")
        group.add_argument(
            "--init-checkpoint",
            metavar="CKPT",
            help="start from the weights of this checkpoint, or of a run's best, of the same genotype and size; with "
            "other classes the classifiers start anew",
        )
        group.add_argument("--epochs", type=positive_int, default=600, metavar="N", help="epochs")
        group.add_argument(
            "--hold-out",
            type=probability,
            default=0.0,
            metavar="F",
            help="train on all but this fraction of the training images, and report accuracy on these instead of the "
            "test images, which are not opened; 0: none",
        )
        group.add_argument(
            "--batch-size", type=positive_int, default=96, metavar="N", help="images a step, over all ranks"
        )
        group.add_argument("--lr", type=positive, default=0.025, metavar="LR", help="learning rate at the start")
        group.add_argument(
            "--lr-decay",
            type=number(float, 0, 1, low_open=True),
            metavar="FACTOR",
            help="of the learning rate after each epoch; without it, along a cosine to zero",
        )
        group.add_argument(
            "--label-smoothing", type=probability, default=0.0, metavar="P", help="spread evenly over all classes"
        )
        group.add_argument("--momentum", type=probability, default=0.9, metavar="M", help="SGD's momentum")
        group.add_argument("--weight-decay", type=nonnegative, default=3e-4, metavar="D", help="SGD's weight decay")
        group.add_argument("--grad-clip", type=positive, default=5.0, metavar="NORM", help="gradient norm")
        group.add_argument(
            "--aux-weight", type=nonnegative, default=0.4, metavar="W", help="auxiliary loss; 0: no head"
        )
        group.add_argument(
            "--cutout-length",
            type=natural,
            default=16,
            metavar="PIXELS",
            help="side of the square cut out; at most half the image's",
        )
        group.add_argument(
            "--drop-path-prob", type=probability, default=0.2, metavar="P", help="approached linearly, from 0"
        )
        _add_data_and_run(parser, "augment")


def _add_execution(group):
    group.add_argument(
        "--execution",
        default="fused",
        choices=EXECUTIONS,
        help="of the cells: fast, or an operation at a time, which is the definition",
    )


def add_data(parser):
    """The options that choose and load the images, of both stages."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="digits", choices=list(DATASETS), help="data set")
    group.add_argument("--data-path", default="data", metavar="DIR", help="where data sets are, or are downloaded to")
    group.add_argument(
        "--image-size",
        type=number(int, 8, 8192),
        default=32,
        metavar="PIXELS",
        help="of the data set `folder`: images are scaled and cropped to this height and width",
    )
    group.add_argument(
        "--image-channels", type=int, default=3, choices=(1, 3), help="of the data set `folder`: 1 grey, 3 colour"
    )
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="of the data set `folder`: read all first, and leave out those that cannot be read",
    )
    group.add_argument(
        "--workers", type=natural, default=2, metavar="N", help="processes that load images, for each rank; 0: none"
    )


def _add_data_and_run(parser, stage):
    """The options that both stages have."""
    add_data(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--name", type=folder_name, metavar="NAME", help="name of the run's folder (default: the data set)"
    )
    group.add_argument("--runs-path", default="runs", metavar="DIR", help=f"a run's folder is DIR/{stage}/NAME")
    group.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds, if any")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder (or from a checkpoint in it), with its options; "
        + ", ".join(f"--{option_name(name)}" for name in MAY_CHANGE)
        + " may be given anew",
    )
    group.add_argument(
        "--auto-resume",
        action="store_true",
        help="go on with the run of this name if there is one, for commands that a scheduler repeats",
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=nonnegative,
        default=10.0,
        metavar="MIN",
        help="save within an epoch too, this often; 0: after every step",
    )
    group.add_argument("--seed", type=natural, default=2, metavar="N", help="of everything that is random")
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--gpus",
        type=gpus,
        metavar="LIST",
        help="run on several GPUs of this machine, a process each: 0,1,2 or all; torchrun does so over machines",
    )
    group.add_argument(
        "--sync-bn",
        action="store_true",
        help="on several ranks: normalise by the statistics of the global batch, not of each rank's part",
    )
    group.add_argument("--amp", action="store_true", help="mixed precision: bfloat16 where PyTorch deems it safe")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU: use algorithms that give the same bits each time, as a CPU does without it",
    )
    group.add_argument("--print-freq", type=positive_int, default=50, metavar="N", help="steps between log lines")
