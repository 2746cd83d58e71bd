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
    "none": lambda size: transforms.Compose([]),
    "crop": lambda size: transforms.RandomCrop(size, padding=size // 8),  # 4 pixels at 32
    "flip": lambda size: transforms.RandomHorizontalFlip(),
    "affine": lambda size: transforms.RandomAffine(
        15, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=0.1, interpolation=transforms.InterpolationMode.BILINEAR
    ),
    "resized-crop": transforms.RandomResizedCrop,  # for images of any size, such as ImageNet's
    "colour": lambda size: transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
}


def preprocessing(dataset: str, size: int, channels: int, crops: bool, resize: str = "crop") -> str:
    """Describe, in words that can be followed, how validation turns an image file into one of `size` pixels a side.

    Arguments as of `data_transforms`; channels: 1 or 3.
    """
    if dataset != "folder":
        return f"none: images have {size} x {size} pixels"
    mode = {1: "grey (Pillow's mode L)", 3: "RGB"}[channels]
    if resize == "squeeze":
        resized = f"to {size} x {size} pixels"
    else:
        shorter, rounded = (size * 8 // 7, "rounded down") if crops else (size, "rounded")
        resized = (
            f"so that the shorter side has {shorter} pixels and the longer side is {rounded} to whole pixels; then the "
            f"middle {size} x {size} pixels"
        )
    return (
        "the image is turned as its EXIF orientation says; what is transparent is laid on white; grey levels of 16 "
        f"bits are divided by 256, of 12 bits by 16, and rounded down; it is converted to 8-bit {mode}; it is resized "
        f"with Pillow's Image.resize(size, Image.Resampling.BILINEAR), which is antialiased, {resized}"
    )


def data_transforms(
    dataset: str,
    cutout_length: int,
    size: int | None = None,
    mean_std: tuple | None = None,
    crops: bool = False,
    augmentation: str | None = None,
    resize: str = "crop",
) -> tuple[transforms.Compose, transforms.Compose]:
    """Transforms of a data set's images for training and for validation: (train, valid), from PIL to float tensors.

    dataset: a key of `DATASETS`; cutout_length: pixels, in training only; size: of the images, in pixels (default: that
    of the data set); mean_std: (mean, std) per channel, of pixels in [0, 1] (default: the constants of the data set; if
    it has none, images are not normalised, which is why `get_data` computes them); crops: the images have any size,
    which these transforms change to `size`; augmentation: names of `AUGMENTATIONS`, joined by +, in the order in which
    they are applied (default: that of the data set; with `crops` random resized crops, flips and colour changes);
    resize: one of `images.image_folder.RESIZES`, with `crops` only. Raises ValueError for an unknown data set.

    All randomness is drawn from torch's global generator, which `images.loading.Images` seeds for each sample.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    mean_std = mean_std or spec.mean_std
    size = size or spec.size
    names = (augmentation or ("resized-crop+flip+colour" if crops else spec.augmentation)).split("+")
    to_size = []
    if crops and resize == "squeeze":
        to_size = [transforms.Resize((size, size))]
    elif crops:
        to_size = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]  # 256 at 224
    to_tensor = [transforms.ToTensor()]
    if mean_std:
        to_tensor.append(transforms.Normalize(*mean_std))
    takes_any_size = resize == "crop" and "resized-crop" in names
    train = [*([] if takes_any_size else to_size), *(AUGMENTATIONS[name](size) for name in names), *to_tensor]
    if cutout_length > 0:
        train.append(Cutout(cutout_length))
    return transforms.Compose(train), transforms.Compose(to_size + to_tensor)
