"""The network that augment.py trains: a stack of cells of one genotype, and an auxiliary head (DARTS, app. A.2.1)."""

import functools

import torch
from torch import nn

from models.choices import STEMS
from models.genotype import Genotype
from models.ops import DropPath_, StdConv
from models.search_cnn import check_positive
from models.spaces import space_of


class AuxiliaryHead(nn.Module):
    """A second classifier, at two thirds of the depth; its weighted loss is added to the training loss.

    input_size: height and width of its input, in pixels; C: channels of its input. Sizes 7 and 8 are pooled by 5x5
    windows to 2x2, as in the authors' code; other sizes by adaptive pooling to 2x2.
    """

    def __init__(self, input_size: int, C: int, n_classes: int):
        super().__init__()
        if input_size in (7, 8):
            pool = nn.AvgPool2d(5, stride=input_size - 5, padding=0, count_include_pad=False)
        else:
            pool = nn.AdaptiveAvgPool2d(2)
        self.net = nn.Sequential(
            nn.ReLU(),
            pool,
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.linear = nn.Linear(768, n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.net(x).flatten(1))


class ImageNetStem(nn.Module):
    """The stem for ImageNet, as in the authors' code; the paper trains on images of 224 pixels (appendix A.2.3).

    Returns the two inputs of the first cell, each of C channels: at a quarter and at an eighth of the images' size.
    """

    def __init__(self, C_in: int, C: int):
        super().__init__()
        self.quarter = nn.Sequential(
            nn.Conv2d(C_in, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.eighth = StdConv(C, C, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s0 = self.quarter(x)
        return s0, self.eighth(s0)


class AugmentCNN(nn.Module):
    """The augment network: a stack of cells of one genotype.

    input_size: height and width of the images, in pixels, at least 8
    auxiliary: whether there is an auxiliary head, after cell 2 * n_layers // 3
    stem: one of `STEMS`; `imagenet` needs images of at least 64 pixels, and its cells get an eighth of that size

    genotype: of any search space; auxiliary, stem_multiplier and stem are for DARTS's

    The other arguments are those of `SearchCNN`. Raises ValueError if a number is too small or the stem or execution is
    unknown, and GenotypeError if the genotype is invalid.
    """

    def __init__(
        self,
        input_size: int,
        C_in: int,
        C: int,
        n_classes: int,
        n_layers: int,
        auxiliary: bool,
        genotype: Genotype,
        stem_multiplier: int = 3,
        stem: str = "cifar",
        execution: str = "fused",
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}")
        check_positive(
            input_size=input_size,
            C_in=C_in,
            C=C,
            n_classes=n_classes,
            n_layers=n_layers,
            stem_multiplier=stem_multiplier,
        )
        space = space_of(genotype)
        space.check(genotype)
        self.n_inputs = space.n_inputs
        self.aux_pos = 2 * n_layers // 3 if auxiliary else None
        self.aux_head = None
        self.batch = None  # see `set_drop_path_rows`

        imagenet = stem == "imagenet"
        if imagenet:
            # input 1 of the first cell is half as large as input 0
            self.stem, C_stem, options = ImageNetStem(C_in, C), C, {"reduction_p": True}
        else:
            self.stem, C_stem = space.stem(C_in, C, stem_multiplier)
            options = {}
        new_cell = functools.partial(space.augment_cell, genotype=genotype, execution=execution)
        self.cells = nn.ModuleList()
        size = -(-input_size // 8) if imagenet else input_size
        for layer in space.layers(C_stem, C, n_layers, new_cell, **options):
            size = -(-size // layer.stride)
            if len(self.cells) == self.aux_pos:
                self.aux_head = AuxiliaryHead(size, layer.C_out, n_classes)
            self.cells.append(layer.module)
        self.gap = space.head(layer.C_out)
        self.linear = nn.Linear(layer.C_out, n_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (N, C_in, H, W) -> (logits, aux_logits), each (N, n_classes); aux_logits is None in eval."""
        aux_logits = None
        stem = self.stem(x)
        inputs = stem if isinstance(stem, tuple) else [stem] * self.n_inputs
        for layer, cell in enumerate(self.cells):
            inputs = [*inputs[1:], cell(*inputs)]
            if layer == self.aux_pos and self.training:
                aux_logits = self.aux_head(inputs[-1])
        return self.linear(self.gap(inputs[-1]).flatten(1)), aux_logits

    def drop_path_prob(self, p: float) -> None:
        """Set the drop path probability of every operation."""
        for module in self._drop_paths():
            module.p = p

    def set_drop_path_rows(self, n: int, rows: slice) -> None:
        """Tell the drop path modules that the next batch is the slice `rows` of a global batch of n samples.

        Then several processes together drop the samples that one process would drop (see `drop_path_`).
        """
        if (n, rows) != self.batch:
            self.batch = n, rows
            for module in self._drop_paths():
                module.batch = self.batch

    def _drop_paths(self):
        return (module for module in self.modules() if isinstance(module, DropPath_))
