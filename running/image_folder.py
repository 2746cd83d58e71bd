"""Folders of images, a folder for each class: which files are images of which class, and how one is read.

Only the names of files are read until an image is asked for, in time linear in their number.
"""

import contextlib
import functools
import os
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from running.errors import UserError, warn

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what a file holds, whatever its name ends in
SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # which file managers leave behind
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
MAX_ASPECT_RATIO = 100  # scaled until its shorter side fits, a longer image would take gigabytes
LISTED = 10  # names in a message, at most

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of metadata, which no pixel depends on

warn_once = functools.cache(warn)  # a folder without val/ is listed for its training and for its test images


class ImageFolder:
    """The images in root/CLASS/ and the folders in it, class by class, in the order of their paths.

    folder[i] is (PIL image, label). classes: the classes' names, sorted, with bytes that are no UTF-8 written as \\xNN;
    names: the files, relative to root, with slashes; labels: an index into `classes` for each.
    """

    def __init__(self, root, classes, names, labels, read):
        self.root = root
        self.classes = classes
        self.names = names
        self.labels = labels
        self.read = read  # function of a file's path that returns a PIL image

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.read(os.path.join(self.root, self.names[i])), self.labels[i]

    def part(self, indices):
        """The folder with these images only."""
        names, labels = ([values[i] for i in indices] for values in (self.names, self.labels))
        return ImageFolder(self.root, self.classes, names, labels, self.read)


def list_folder(root, read, skip_bad_images=False):
    """The `ImageFolder` at `root`. Warns of what in it is left out: hidden names, files that are no images.

    skip_bad_images: read all images first, and leave out those that cannot be read, with a warning that counts them.
    Raises UserError unless there are two classes or more, each with an image.
    """
    root = str(root)
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist; --data-path must name a folder that holds train/CLASS/*")
    left_out = defaultdict(list)  # reason: names
    classes, names, labels = [], [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not entry.is_dir():
            _leave_out(entry.name, "in no class's folder", left_out)
        elif is_hidden(entry.name):
            _leave_out(entry.name, "hidden", left_out)
        else:
            images = _images_of_class(root, entry.name, left_out)
            names += images
            labels += [len(classes)] * len(images)
            classes.append(os.fsencode(entry.name).decode("utf-8", "backslashreplace"))
    if left_out:
        reasons = (f"{len(files)} {reason}, first {files[0]}" for reason, files in left_out.items())
        warn_once(f"{root}: left out are {'; '.join(reasons)}")
    folder = ImageFolder(root, classes, names, labels, read)
    if len(classes) < 2:
        content = f"one class, {classes[0]}" if classes else "no class"
        raise UserError(f"image folder {root} holds {content}; it must hold a folder for each class, at least two")
    _check_classes_have_images(folder, f"; files of images end in {' '.join(ENDINGS)}")
    return _readable_part(folder) if skip_bad_images else folder


def _images_of_class(root, name, left_out):
    """The files of images in root/name and in the folders in it, relative to root.

    Links are followed, to each folder once. Adds the names of what is left out to `left_out`.
    """
    entered = {_identity(path) for path in (root, *Path(root).resolve().parents)}
    images = {}  # folder: files
    pending = [name]
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder)
        if _identity(path) in entered:
            _leave_out(folder, "links back to a folder", left_out)
            continue
        entered.add(_identity(path))
        images[folder], folders = [], []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    _leave_out(f"{folder}/{entry.name}", "hidden", left_out)
                elif entry.is_dir():
                    folders.append(f"{folder}/{entry.name}")
                elif not entry.name.lower().endswith(ENDINGS):
                    _leave_out(f"{folder}/{entry.name}", "whose names do not end as an image's", left_out)
                elif not entry.is_file():
                    _leave_out(f"{folder}/{entry.name}", "that are no files", left_out)
                else:
                    images[folder].append(f"{folder}/{entry.name}")
        pending += reversed(folders)
    return [file for folder in sorted(images) for file in images[folder]]


def is_hidden(name):
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _leave_out(name, reason, left_out):
    if os.path.basename(name) not in SYSTEM_FILES:
        left_out[reason].append(name)


def _identity(path):
    """What tells a folder from others, whatever links lead to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _check_classes_have_images(folder, rest_of_complaint):
    """Raise UserError unless each class has an image."""
    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    empty = [name for name, count in zip(folder.classes, counts) if count == 0]
    if empty:
        raise UserError(f"image folder {folder.root}: no image of {listed(empty)}{rest_of_complaint}")


def _readable_part(folder):
    """The images of a folder that can be read."""

    def complaint(i):
        try:
            folder[i]
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        complaints = list(pool.map(complaint, range(len(folder))))
    bad = [text for text in complaints if text]
    if not bad:
        return folder
    readable = folder.part([i for i, text in enumerate(complaints) if not text])
    _check_classes_have_images(readable, f" can be read; the first: {bad[0]}")
    warn_once(f"{folder.root}: {len(bad)} of {len(folder)} images left out; the first: {bad[0]}")
    return readable


def listed(words):
    """The words with commas, at most the first ten."""
    return ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED} more" if len(words) > LISTED else "")


def open_image(file, size, mode):
    """The image's centre, as a square of `size` pixels a side; the whole image where size is None.

    mode: "L" or "RGB". The image is turned as its EXIF orientation says; what is transparent is laid on white; of 16
    bits the upper 8 are kept, as they lie: a camera's 12 bits in a file of 16 become nearly black. Of several frames
    or pages it is the first. Raises UserError where it cannot be read, or is more than `MAX_ASPECT_RATIO` times as long
    as it is wide.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            shorter, longer = sorted(opened.size)
            if longer > MAX_ASPECT_RATIO * shorter:
                width, height = opened.size
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_ASPECT_RATIO} to 1")
            opened.load()
            with contextlib.suppress(Exception):  # damaged EXIF data: the image is as it is stored
                ImageOps.exif_transpose(opened, in_place=True)
            image = _eight_bits(opened, mode)
    except Exception as error:  # damaged files make the readers raise a dozen types
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read the image {file}: {reason}; --skip-bad-images goes on without it") from None
    if size is None:
        return image
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _eight_bits(image, mode):
    """An image of any mode in 8 bits a channel, mode "L" or "RGB", what is transparent laid on white."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, of no known range")
    if image.mode.startswith("I"):  # which `convert` would clip at 255
        return _from_integers(image).convert(mode)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    if image.mode == "LAB":  # for which Pillow has no direct way to grey
        image = image.convert("RGB")
    return image.convert(mode)


def _from_integers(image):
    """The upper 8 of the 16 bits of grey levels, or of 12 where a TIFF file says so; mode "L"."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels reach from {levels.min()} to {levels.max()}, where 0 to 65535 is read")
    bits = 12 if getattr(image, "tag_v2", {}).get(258) == (12,) else 16  # tag 258: BitsPerSample
    grey = (levels >> (bits - 8)).astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)
