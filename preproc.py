"""From images to tensors: augmentation, normalisation and cutout (cutout as in DARTS, appendix A.2.1)."""

import torch
from torchvision import transforms

from running.data_sets import DATASETS


class Cutout:
    """Set a square to zero, centred at a random pixel and clipped at the border (DeVries & Taylor, arXiv:1708.04552).

    length: the square's side, in pixels; 0 leaves images alone. Takes and returns a tensor (C, H, W); after
    normalisation, zero is the mean colour.
    """

    def __init__(self, length):
        self.length = length

    def __call__(self, img):
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


def augmentation(kind, size):
    """The random transforms of images of this kind, `size` pixels a side: a key of `DATASETS`'s `augmentation`."""
    crop = transforms.RandomCrop(size, padding=size // 8)  # 4 pixels at 32
    flip = transforms.RandomHorizontalFlip()
    affine = transforms.RandomAffine(
        15, translate=(0.1, 0.1), scale=(0.9, 1.1), shear=0.1, interpolation=transforms.InterpolationMode.BILINEAR
    )
    if kind == "parts+flip+colour":  # of images of any size, as for ImageNet
        return [transforms.RandomResizedCrop(size), flip, transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)]
    return {"crop": [crop], "crop+flip": [crop, flip], "affine": [affine], "affine+flip": [affine, flip]}[kind]


def preprocessing(dataset, size, crops):
    """How a picture of any size becomes one of `size` pixels a side in validation, in words."""
    if dataset != "folder":
        return f"none: pictures have {size} x {size} pixels"
    shorter = size * 8 // 7 if crops else size
    return f"scaled (bilinear) to {shorter} pixels on the shorter side, then the middle {size} x {size}"


def data_transforms(dataset, cutout_length, size=None, mean_std=None, crops=False):
    """Transforms of a data set's images for training and for validation: (train, valid), from PIL to float tensors.

    dataset: a key of `DATASETS`; cutout_length: pixels, in training only; size: of the images, in pixels (default: the
    data set's own); mean_std: (mean, std) per channel, of pixels in [0, 1] (default: the data set's constants; without
    those images are not normalised, which is why `get_data` computes them); crops: for images of any size, of which
    training sees random parts, flipped and in other colours, and validation the middle. Raises ValueError for an
    unknown data set.

    All randomness is drawn from torch's global generator, which `running.loading.Images` seeds for each sample.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; there are {', '.join(DATASETS)}")
    spec = DATASETS[dataset]
    mean_std = mean_std or spec.mean_std
    to_tensor = [transforms.ToTensor()]
    if mean_std:
        to_tensor.append(transforms.Normalize(*mean_std))
    size = size or spec.size
    train = augmentation("parts+flip+colour" if crops else spec.augmentation, size) + to_tensor
    if cutout_length > 0:
        train.append(Cutout(cutout_length))
    centre = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)] if crops else []  # 256 at 224
    return transforms.Compose(train), transforms.Compose(centre + to_tensor)
