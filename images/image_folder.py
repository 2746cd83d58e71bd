"""Image folders with a subfolder for each class: how images are listed and read.

Listing reads file names only, in time linear in their number. An image is read when it is indexed.
"""

import functools
import logging
import os
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from command_line.errors import UserError, warn

ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # accepted formats of the content of a file
SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # written by file managers, and ignored
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
MAX_ASPECT_RATIO = 100  # a longer image would take gigabytes when its shorter side is scaled to size
LISTED = 10  # the largest number of names in a message

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata, which does not affect pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice that many pixels are an error
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs, it raises too

UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warn_once = functools.cache(warn)  # a folder without val/ is listed twice, for training and for test images


class ImageFolder:
    """The images in root/CLASS/ and its subfolders, sorted by class and path.

    folder[i] is (PIL image, label). classes: the names of the classes, sorted, with bytes that are not UTF-8 written as
    \\xNN; names: the files' paths relative to root, with slashes; labels: for each image an index into `classes`.
    """

    def __init__(self, root, classes, names, labels, read):
        self.root = root
        self.classes = classes
        self.names = names
        self.labels = labels
        self.read = read  # function: file path -> PIL image

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return self.read(os.path.join(self.root, self.names[i])), self.labels[i]

    def part(self, indices):
        """An `ImageFolder` with only the images of these indices."""
        names, labels = ([values[i] for i in indices] for values in (self.names, self.labels))
        return ImageFolder(self.root, self.classes, names, labels, self.read)


def list_folder(root, read, skip_bad_images=False, data_path=None):
    """List the `ImageFolder` at `root`. Warns if it leaves out anything: hidden names, files that are not images.

    skip_bad_images: read all images first, and leave out those that cannot be read, and links out of `data_path`, with
    warnings that count them. data_path: the folder within which links must stay (default: root), which may be reached
    by a link itself. Raises UserError unless there are at least two classes, each with an image.
    """
    root, top = str(root), os.path.realpath(data_path or root)
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} does not exist; --data-path must name a folder that holds train/CLASS/*")
    _odd_link(root, top, skip_bad_images=None)
    left_out = defaultdict(list)  # reason: names
    classes, names, labels = [], [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_symlink() and (reason := _odd_link(entry.path, top, skip_bad_images)):
            _leave_out(entry.name, reason, left_out)
        elif not entry.is_dir():
            _leave_out(entry.name, "in no class's folder", left_out)
        elif is_hidden(entry.name):
            _leave_out(entry.name, "hidden", left_out)
        else:
            images = _images_of_class(root, entry.name, left_out, top, skip_bad_images)
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


def _images_of_class(root, name, left_out, top, skip_bad_images):
    """The image files in root/name and its subfolders, as paths relative to root.

    Links are followed within the folder `top`, but each folder is entered only once. Names that are left out are added
    to `left_out`.
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
                elif entry.is_symlink() and (reason := _odd_link(entry.path, top, skip_bad_images)):
                    _leave_out(f"{folder}/{entry.name}", reason, left_out)
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


def _odd_link(path, top, skip_bad_images):
    """Why a link in an image folder is left out, or None. Raises UserError if it leads out of the folder `top`.

    top: a real path; skip_bad_images: whether such a link is left out, too; None: it cannot be.
    """
    target = os.path.realpath(path)
    if not os.path.exists(path):  # it leads to nothing, or to itself
        return "that are no files"
    if Path(target).is_relative_to(top):
        return None
    if skip_bad_images:
        return "links out of the folder"
    others = "" if skip_bad_images is None else "; --skip-bad-images goes on without it"
    raise UserError(f"{path} is a link out of {top}, to {target}; copy what it leads to, as by cp -rL{others}")


def _identity(path):
    """An identifier of a folder that is the same for all links to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _check_classes_have_images(folder, rest_of_complaint):
    """Raise UserError unless each class has an image."""
    counts = np.bincount(folder.labels, minlength=len(folder.classes))
    empty = [name for name, count in zip(folder.classes, counts) if count == 0]
    if empty:
        raise UserError(f"image folder {folder.root}: no image of {listed(empty)}{rest_of_complaint}")


def _readable_part(folder):
    """The part of an `ImageFolder` whose images can be read. Reads all of them."""

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
    """The words, separated by commas; only the first `LISTED`, and how many more there are."""
    return ", ".join(words[:LISTED]) + (f" and {len(words) - LISTED} more" if len(words) > LISTED else "")


def open_image(file, size, mode):
    """The centre crop of an image, scaled to `size` pixels a side; the whole image if size is None.

    mode: "L" or "RGB". The image is rotated by its EXIF orientation. Transparent parts are blended with white. Of 16
    bits the upper 8 are used without rescaling, so a camera's 12 bits in a 16-bit file become nearly black. Of several
    frames or pages the first is used. Raises UserError if the image cannot be read, or its aspect ratio is above
    `MAX_ASPECT_RATIO`.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            shorter, longer = sorted(opened.size)
            if longer > MAX_ASPECT_RATIO * shorter:
                width, height = opened.size
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_ASPECT_RATIO} to 1")
            opened.load()
            orientation = opened.getexif().get(ExifTags.Base.Orientation)
            turned = opened.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else opened
            image = _eight_bits(turned, mode)
    except MemoryError:  # says nothing of the file, which must not be left out as damaged
        raise
    except Exception as error:  # for damaged files, readers raise a dozen different types
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
    """Convert an image of any mode to 8 bits per channel, mode "L" or "RGB", blended with white."""
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, of no known range")
    if image.mode.startswith("I"):  # which `convert` would clip at 255
        return _from_integers(image).convert(mode)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    if image.mode == "LAB":  # Pillow cannot convert LAB to grey directly
        image = image.convert("RGB")
    return image.convert(mode)


def _from_integers(image):
    """Convert 16-bit grey levels, or 12-bit ones if a TIFF tag says so, to the upper 8 bits, mode "L"."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its pixels reach from {levels.min()} to {levels.max()}, where 0 to 65535 is read")
    bits = 12 if getattr(image, "tag_v2", {}).get(258) == (12,) else 16  # tag 258: BitsPerSample
    grey = (levels >> (bits - 8)).astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)
