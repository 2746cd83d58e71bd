"""How an image file becomes pixels: what is seen in a picture viewer is what a network is trained on."""

import numpy as np
import pytest
from PIL import Image, ImageOps

import preproc
from command_line.errors import UserError
from images.image_folder import RESIZES, open_image

LEVELS = np.array([[0, 255, 256, 4095], [32768, 40000, 65280, 65535]], dtype=np.uint16)


def pixels(path, mode="L", size=None):
    return np.asarray(open_image(path, size, mode))


def test_grey_levels_above_255_are_scaled_from_12_or_16_bits_in_every_format(tmp_path):
    Image.fromarray(LEVELS).save(tmp_path / "16 bits.png")
    Image.fromarray(LEVELS).save(tmp_path / "16 bits.tif")
    Image.fromarray(LEVELS.astype(np.int32)).save(tmp_path / "32 bits.tif")
    (tmp_path / "16 bits.pgm").write_bytes(b"P5 4 2 65535\n" + LEVELS.astype(">u2").tobytes())
    for path in tmp_path.iterdir():
        assert np.array_equal(pixels(path), LEVELS // 256), path
        assert np.array_equal(pixels(path, "RGB"), np.stack([LEVELS // 256] * 3, axis=2)), path
    values = np.array([0, 256, 2048, 4095], ">u2")
    (tmp_path / "12 bits.pgm").write_bytes(b"P5 4 1 4095\n" + values.tobytes())
    assert pixels(tmp_path / "12 bits.pgm").tolist() == [[0, 16, 128, 255]]


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_integers_beyond_16_bits_are_refused_by_what_they_are(values, tmp_path):
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif: its pixels reach from {values[0]} to {values[1]}"):
        pixels(tmp_path / "x.tif")


BAR = np.zeros((6, 6), dtype=np.uint8)  # opaque in the middle
BAR[:, 2:4] = 255
BLACK = np.zeros_like(BAR)


def transparent_images():
    """name -> (image, options of `save`): each a black bar, and all around it transparent pixels of another colour."""
    palette = Image.frombytes("P", (6, 6), (BAR // 255).tobytes())
    palette.putpalette([40, 40, 40, 0, 0, 0])
    grey = np.where(BAR == 255, 0, 40).astype(np.uint8)
    return {
        "RGBA.png": (Image.fromarray(np.dstack([BLACK, BLACK, BLACK, BAR])), {}),
        "RGBA.tif": (Image.fromarray(np.dstack([BLACK, BLACK, BLACK, BAR])), {}),
        "RGBA.webp": (Image.fromarray(np.dstack([BLACK, BLACK, BLACK, BAR])), {"lossless": True}),
        "LA.png": (Image.fromarray(np.dstack([BLACK, BAR])), {}),
        "palette, one colour transparent.png": (palette, {"transparency": 0}),
        "palette, alpha for each colour.png": (palette, {"transparency": bytes([0, 255])}),
        "palette.gif": (palette, {"transparency": 0}),
        "grey, one level transparent.png": (Image.fromarray(grey), {"transparency": 40}),
        "RGB, one colour transparent.png": (Image.fromarray(np.dstack([grey] * 3)), {"transparency": (40, 40, 40)}),
        "two levels.png": (Image.fromarray(255 - BAR).convert("1"), {"transparency": 1}),
    }


@pytest.mark.parametrize("name", transparent_images())
def test_what_is_transparent_is_white(name, tmp_path):
    image, options = transparent_images()[name]
    image.save(tmp_path / name, **options)
    for mode in ("L", "RGB"):
        assert np.array_equal(pixels(tmp_path / name, mode), np.asarray(Image.fromarray(255 - BAR).convert(mode)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_as_their_exif_orientation_says(ending, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    image.save(tmp_path / f"x.{ending}", exif=exif)
    with Image.open(tmp_path / f"x.{ending}") as stored:
        assert np.array_equal(pixels(tmp_path / f"x.{ending}", "RGB"), np.asarray(ImageOps.exif_transpose(stored)))
    assert pixels(tmp_path / f"x.{ending}").shape == ((9, 5) if orientation > 4 else (5, 9))


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_of_several_frames_or_pages_the_first_is_read(ending, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **options)
    assert pixels(tmp_path / f"x.{ending}", "RGB")[0, 0].tolist() == [255, 0, 0]


def follow(file, size, channels, crops, resize):
    """What `preproc.preprocessing` says, done with Pillow and NumPy alone."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert({1: "L", 3: "RGB"}[channels])
    if resize == "squeeze":
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    shorter = size * 8 // 7 if crops else size
    sides = [side * shorter / min(image.size) for side in image.size]
    image = image.resize([int(side) if crops else round(side) for side in sides], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_said_of_the_preprocessing_can_be_followed(channels, crops, resize, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 84, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "transparent.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "16 bits.png")
    text = preproc.preprocessing("folder", 28, channels, crops, resize)
    for mention in ("EXIF", "white", "16 bits", "antialiased", "28 x 28"):
        assert mention in text
    _, transform = preproc.data_transforms("folder", 0, 28, None, crops, resize=resize)
    for file in tmp_path.iterdir():
        image = open_image(file, None if crops else 28, {1: "L", 3: "RGB"}[channels], resize)
        seen = (transform(image) * 255).round().byte().permute(1, 2, 0).numpy().squeeze()
        assert np.abs(seen.astype(int) - follow(file, 28, channels, crops, resize)).max() <= 1, file


def test_files_that_are_not_images_are_one_line_and_damaged_ones_too_or_an_image(tmp_path):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    contents = [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"DDS " + bytes(40), b"II*\0" * 9]
    for ending in ("bmp", "gif", "jpg", "png", "ppm", "tif", "webp"):
        image.save(tmp_path / f"x.{ending}")
        whole = (tmp_path / f"x.{ending}").read_bytes()
        for _ in range(30):
            damaged = bytearray(whole[: generator.integers(1, len(whole))])
            damaged[generator.integers(len(damaged))] ^= 1 << generator.integers(8)
            contents.append(bytes(damaged))
    errors = []
    for content in contents:
        (tmp_path / "damaged.png").write_bytes(content)
        try:
            open_image(tmp_path / "damaged.png", 8, "RGB")
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert all("cannot read the image" in error and "damaged.png" in error for error in errors)
    assert not any("\n" in error for error in errors)
