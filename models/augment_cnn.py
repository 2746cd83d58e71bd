"""The network of the second stage: a genotype stacked deep, with an auxiliary head (DARTS, section 4.2)."""

from torch import nn

from genotypes import check
from models.augment_cells import AugmentCell
from models.choices import STEMS
from models.ops import DropPath_, StdConv
from models.search_cnn import check_positive, reduction_cells


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth, whose loss helps in training.

    input_size: height and width at that cell, in pixels. 7 and 8 are pooled as published, by 5x5 windows to 2x2; other
    sizes adaptively to 2x2. C: channels there.
    """

    def __init__(self, input_size, C, n_classes):
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

    def forward(self, x):
        return self.linear(self.net(x).flatten(1))


def cifar_stem(C_in, C):
    """What both inputs of the first cell are, of C channels and the images' size (DARTS, section 4.2)."""
    return nn.Sequential(nn.Conv2d(C_in, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))


class ImageNetStem(nn.Module):
    """The two inputs of the first cell, each of C channels: at a quarter and at an eighth of the images' size.

    For images too large for cells at their size (DARTS, section 4.2, images of 224 pixels).
    """

    def __init__(self, C_in, C):
        super().__init__()
        self.quarter = nn.Sequential(
            nn.Conv2d(C_in, C // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C // 2),
            nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(C),
        )
        self.eighth = StdConv(C, C, 3, 2, 1)

    def forward(self, x):
        s0 = self.quarter(x)
        return s0, self.eighth(s0)


class AugmentCNN(nn.Module):
    """A genotype, stacked.

    input_size: height and width of the images, in pixels, 8 and up; auxiliary: with the auxiliary head, after cell
    2 * n_layers // 3; stem: of `STEMS`; `imagenet` is for images of 64 pixels and up, and leaves the cells an eighth of
    their size; execution: of the cells, see `AugmentCell`; the other arguments are `SearchCNN`'s. Raises ValueError
    where a number is too small or the stem unknown, and GenotypeError for a genotype that cannot be built.
    """

    def __init__(
        self,
        input_size,
        C_in,
        C,
        n_classes,
        n_layers,
        auxiliary,
        genotype,
        stem_multiplier=3,
        stem="cifar",
        execution="fused",
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
        check(genotype)
        self.aux_pos = 2 * n_layers // 3 if auxiliary else None
        self.aux_head = None
        self.batch = None  # see `shared_batch`

        imagenet = stem == "imagenet"
        C_cur = C if imagenet else stem_multiplier * C
        self.stem = ImageNetStem(C_in, C) if imagenet else cifar_stem(C_in, C_cur)
        self.cells = nn.ModuleList()
        C_pp, C_p, reduction_p = C_cur, C_cur, imagenet  # the second input is half as large as the first
        size = -(-input_size // 8) if imagenet else input_size
        for layer in range(n_layers):
            reduction = layer in reduction_cells(n_layers)
            if reduction:
                C, size = 2 * C, -(-size // 2)
            cell = AugmentCell(genotype, C_pp, C_p, C, reduction_p, reduction, execution)
            self.cells.append(cell)
            C_pp, C_p, reduction_p = C_p, cell.C_out, reduction
            if layer == self.aux_pos:
                self.aux_head = AuxiliaryHead(size, C_p, n_classes)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(C_p, n_classes)

    def forward(self, x):
        """Images (N, C_in, H, W) -> (logits, aux_logits), each (N, n_classes); aux_logits is None in eval."""
        aux_logits = None
        stem = self.stem(x)
        s0, s1 = stem if isinstance(stem, tuple) else (stem, stem)
        for layer, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1)
            if layer == self.aux_pos and self.training:
                aux_logits = self.aux_head(s1)
        return self.linear(self.gap(s1).flatten(1)), aux_logits

    def drop_path_prob(self, p):
        """Set the drop path probability of every operation."""
        for module in self._drop_paths():
            module.p = p

    def shared_batch(self, n, rows):
        """Say that the next images are the slice `rows` of a batch of n that several processes share."""
        if (n, rows) != self.batch:
            self.batch = n, rows
            for module in self._drop_paths():
                module.batch = self.batch

    def _drop_paths(self):
        return (module for module in self.modules() if isinstance(module, DropPath_))
