"""An image folder may come from a stranger: nothing outside is read, and what is no image of it is told in one line."""

import shutil
import struct
import subprocess
import sys

import pytest
from conftest import ROOT
from gates import refused
from PIL import Image

import search
from command_line.errors import UserError
from utils import get_data

LINKS_OUT = {
    "an image": ("train/left/000.png", "elsewhere/train/left/000.png"),
    "a folder in a class": ("train/left/more", "elsewhere/train/left"),
    "a class": ("train/more", "elsewhere/train/left"),
    "an image, by a link within": ("train/left/000.png", "images/out.png"),
}


@pytest.mark.parametrize("kind", LINKS_OUT)
def test_a_link_out_of_the_folder_is_refused_or_left_out(kind, image_folder, tmp_path, capsys):
    root, path, target = image_folder(), *LINKS_OUT[kind]
    shutil.copytree(root, tmp_path / "elsewhere")
    (root / "out.png").symlink_to(tmp_path / "elsewhere" / "train" / "left" / "000.png")
    (root / path).unlink(missing_ok=True)
    (root / path).symlink_to(tmp_path / target)
    words = ["--dataset", "folder", "--data-path", root, "--runs-path", tmp_path]
    refused(capsys, search.main, words, path, "elsewhere", "--skip-bad-images")
    train = get_data("folder", root, 0, False, skip_bad_images=True)[3]
    assert len(train) == (23 if path.endswith(".png") else 24)
    assert f"1 links out of the folder, first {path.removeprefix('train/')}" in capsys.readouterr().err


def test_a_part_of_the_folder_that_is_elsewhere_is_refused(image_folder, tmp_path):
    root = image_folder()
    (root / "val").rename(tmp_path / "val")
    (root / "val").symlink_to(tmp_path / "val")
    with pytest.raises(UserError, match="val is a link out of"):
        get_data("folder", root, 0, True, skip_bad_images=True)


@pytest.mark.process
def test_pillow_says_nothing_beside_our_line(tmp_path):
    """Its warnings about many pixels, and what it logs, have lines of their own."""
    Image.new("L", (12, 12)).save(tmp_path / "many.png")
    tags = {256: 9, 257: 9, 258: 1, 259: 1, 262: 1, 273: 8, 277: 65535, 278: 9, 279: 99}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "odd.tif").write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0")
    code = f"""
from PIL import Image
from images.image_folder import open_image
Image.MAX_IMAGE_PIXELS = 100
open_image({str(tmp_path / "many.png")!r}, 8, "L")
try:
    open_image({str(tmp_path / "odd.tif")!r}, 8, "L")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
