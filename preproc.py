"""From images to tensors: augmentation, normalisation and cutout (cutout as in DARTS, appendix A.2.1)."""

import torch
from torchvision import transforms

from images.data_sets import DATASETS


class Cutout:
    """Set a square to zero, centred at a random pixel and clipped at the border (DeVries & Taylor, arXiv:1708.04552).

    length: the square's side, in pixels; 0: no cutout. Takes and returns a tensor (C, H, W). After normalisation, zero
    is the mean colour.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        if self.length == 0:
            return img
        height, width = img.shape[-2:]
        top = int(torch.randint(height, ())) - self.length // 2
        left = int(torch.randint(width, ())) - self.length // 2
        img = img.clone()
        img[..., max(top, 0) : max(top + self.length, 0), max(left, 0) : max(left + self.length, 0)] = 0
        return img

    def __repr__(self):
        return f"Cutout(length={self.length})"


AUGMENTATIONS = {  # name -> function of the side of the images, in pixels, that returns a random transform
    "crop": lambda size: transforms.RandomCrop(size, padding=size // 8),  # 4 pixels at 32
    "flip": lambda size: transforms.RandomHorizontalFlip(),
    "affine": lambda size: transforms.RandomAffine(
        15, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=0.1, interpolation=transforms.InterpolationMode.BILINEAR
    ),
    "resized-crop": transforms.RandomResizedCrop,  # for images of any size, such as ImageNet's
    "colour": lambda size: transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
}


def augmentation(names: str, size: int) -> list:
    """The random transforms for images of `size` pixels a side. names: of `AUGMENTATIONS`, joined by +, in order."""
    return [AUGMENTATIONS[name](size) for name in names.split("+")]


def preprocessing(dataset: str, size: int, crops: bool) -> str:
    """Describe, in words, how validation turns an image of any size into one of `size` pixels a side."""
    if dataset != "folder":
        return f"none: pictures have {size} x {size} pixels"
    shorter = size * 8 // 7 if crops else size
    return f"scaled (bilinear) to {shorter} pixels on the shorter side, then the middle {size} x {size}"


def data_transforms(
    dataset: str,
    cutout_length: int,
    size: int | None = None,
    mean_std: tuple | None = None,
    crops: bool = False,
) -> tuple[transforms.Compose, transforms.Compose]:
    """Transforms of a data set's images for training and for validation: (train, valid), from PIL to float tensors.

    dataset: a key of `DATASETS`; cutout_length: pixels, in training only; size: of the images, in pixels (default: that
    of the data set); mean_std: (mean, std) per channel, of pixels in [0, 1] (default: the constants of the data set; if
    it has none, images are not normalised, which is why `get_data` computes them); crops: for images of any size, with
    random resized crops, flips and colour changes in training, centre crops in validation. Raises ValueError for an
    unknown data set.

    All randomness is drawn from torch's global generator, which `images.loading.Images` seeds for each sample.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    mean_std = mean_std or spec.mean_std
    to_tensor = [transforms.ToTensor()]
    if mean_std:
        to_tensor.append(transforms.Normalize(*mean_std))
    size = size or spec.size
    train = augmentation("resized-crop+flip+colour" if crops else spec.augmentation, size) + to_tensor
    if cutout_length > 0:
        train.append(Cutout(cutout_length))
    centre = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)] if crops else []  # 256 at 224
    return transforms.Compose(train), transforms.Compose(centre + to_tensor)
