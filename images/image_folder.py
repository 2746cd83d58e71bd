"""Image folders with a subfolder for each class: how images are listed and read.

Listing reads file names only, in time linear in their number. An image is read when it is indexed.
"""

import functools
import os
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from command_line.errors import UserError, any_error_in_one_line, warn

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # accepted formats of the content of a file
SYSTEM_NAMES = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini")  # ignored as hidden names are
RESIZES = ("crop", "squeeze")  # how an image that is not square gets its size; see `open_image`
MAX_LISTED = 10  # the largest number of names in a message

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata, which does not affect pixels
warn_once = functools.cache(warn)  # a folder without val/ is listed twice, for training and for test images


@dataclass
class ImageFolder:
    """The images in root/CLASS/ and its subfolders, sorted by class and path. folder[i] is (PIL image, label).

    classes: the names of the classes, sorted, with bytes that are not UTF-8 written as \\xNN; names: the files' paths
    relative to root, with slashes; labels: for each image an index into `classes`; size, mode, resize: see
    `open_image`.
    """

    root: str
    classes: list[str]
    names: list[str]
    labels: list[int]
    size: int | None
    mode: str
    resize: str = "crop"

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        file = os.path.join(self.root, self.names[i])
        return open_image(file, self.size, self.mode, self.resize), self.labels[i]

    def subset(self, indices: list[int]) -> "ImageFolder":
        """An `ImageFolder` with only the images of these indices."""
        return replace(self, names=[self.names[i] for i in indices], labels=[self.labels[i] for i in indices])


def list_folder(
    root: str | Path, size: int | None, mode: str, resize: str = "crop", skip_bad_images: bool = False
) -> ImageFolder:
    """List the `ImageFolder` at `root`, following links. A warning names what is left out, hidden files excepted.

    size, mode, resize: see `open_image`; skip_bad_images: read all images first, and leave out those that cannot be
    read, with a warning that counts them. Raises UserError unless there are at least two classes, each with an image.
    """
    root = str(root)
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist; --data-path must name a folder that holds train/CLASS/*")
    folder = ImageFolder(root, [], [], [], size, mode, resize)
    left_out = []  # paths
    for entry in _visible_entries(root, left_out):
        if entry.is_dir():
            names = images_below(root, entry.name, left_out)
            folder.names += names
            folder.labels += [len(folder.classes)] * len(names)
            folder.classes.append(os.fsencode(entry.name).decode("utf-8", "backslashreplace"))
        else:
            left_out.append(entry.path)
    if left_out:
        paths = listed([os.path.relpath(path, root) for path in left_out])
        warn_once(f"{root}: left out (not an image in the folder of a class, or a link to nowhere or back): {paths}")
    if len(folder.classes) < 2:
        content = f"one class, {folder.classes[0]}" if folder.classes else "no class"
        raise UserError(f"image folder {root} holds {content}; it must hold a folder for each class, at least two")
    if skip_bad_images:
        folder = _readable_images(folder)
    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    empty = [name for name, count in zip(folder.classes, counts) if count == 0]
    if empty:
        raise UserError(f"image folder {root}: no image of {listed(empty)}; files of images end in {' '.join(ENDINGS)}")
    return folder


def images_below(root: str, folder: str, left_out: list[str]) -> list[str]:
    """The image files in root/folder and its subfolders: their paths relative to root, sorted by folder and name.

    folder: a name, or empty for root itself; left_out: gets the paths of all other visible files. Each folder is
    entered once, whatever links lead to it, and none that contains `root`: so loops of links end.
    """
    real_root = Path(root).resolve()
    entered = set(map(str, [real_root, *real_root.parents][not folder :]))
    pending, names = [folder], []
    while pending:
        folder = pending.pop(0)
        path = os.path.join(root, folder)
        if os.path.realpath(path) in entered:
            left_out.append(path)
            continue
        entered.add(os.path.realpath(path))
        for entry in _visible_entries(path, left_out):
            name = f"{folder}/{entry.name}".lstrip("/")
            if entry.is_dir():
                pending.append(name)
            elif entry.name.lower().endswith(ENDINGS):
                names.append(name)
            else:
                left_out.append(entry.path)
    return sorted(names, key=os.path.split)


def _visible_entries(folder, left_out):
    """The entries of a folder, sorted by name, without hidden ones. Links that lead nowhere are added to `left_out`."""
    visible = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() and not os.path.exists(entry.path):
            left_out.append(entry.path)
        elif not entry.name.startswith(".") and entry.name not in SYSTEM_NAMES:
            visible.append(entry)
    return visible


def _readable_images(folder):
    """The part of an `ImageFolder` whose images can be read. Reads all of them."""

    def error_of(i):
        try:
            folder[i]
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(error_of, range(len(folder))))
    bad = [error for error in errors if error]
    if bad:
        warn_once(f"{folder.root}: {len(bad)} of {len(folder)} images left out; the first: {bad[0]}")
    return folder.subset([i for i, error in enumerate(errors) if not error])


def distinguishable(names: list[str]) -> list[str]:
    """The names, but with escapes in those that look like another, such as composed and decomposed letters."""
    looks = [" ".join(unicodedata.normalize("NFKC", name).split()) for name in names]
    return [ascii(name) if looks.count(look) > 1 else name for name, look in zip(names, looks)]


def listed(words: list[str]) -> str:
    """The words, separated by commas; only the first `MAX_LISTED`, and how many more there are."""
    more = f" and {len(words) - MAX_LISTED} more" if len(words) > MAX_LISTED else ""
    return ", ".join(words[:MAX_LISTED]) + more


def open_image(file: str | Path, size: int | None, mode: str, resize: str = "crop") -> Image.Image:
    """An image file as an image of `size` pixels a side; if size is None, as one of its own size.

    mode: "L" or "RGB"; resize: "crop", the middle square of the image, or "squeeze", the whole of it, whose height and
    width are scaled differently if it is not square. The image is turned by its EXIF orientation. Transparent parts are
    blended with white. Of 16 bits the upper 8 are used without rescaling, so a camera's 12 bits in a 16-bit file become
    nearly black. Of several frames or pages the first is used. Raises UserError if the image cannot be read.
    """

    def describe(error):
        reason = str(error) or type(error).__name__
        return f"cannot read the image {file}: {reason}; in training --skip-bad-images leaves it out"

    with any_error_in_one_line(describe), Image.open(file, formats=FORMATS) as opened:
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
        image = _eight_bits(opened, mode)
    if size is None:
        return image
    if resize == "squeeze":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _eight_bits(image, mode):
    """Convert an image of any mode to 8 bits per channel, mode "L" or "RGB", blended with white."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, of no known range")
    if image.mode.startswith("I"):  # integers of 16 or 32 bits, which `convert` would clip at 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"its pixels reach from {levels.min()} to {levels.max()}, where 0 to 65535 is read")
        bits = 12 if getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample) == (12,) else 16
        image = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert(mode)
