import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

from command_line.errors import UserError
from images import data_sets
from images.data_sets import DATASETS, held_out_by_name, load_digits, pixel_statistics, stratified_split
from images.image_folder import list_folder
from images.loading import Images, check_unchanged
from preproc import Cutout, data_transforms
from utils import get_data, get_test_data

CPU = torch.device("cpu")


def synthetic(name):
    """A stand-in for a registry entry's source: four images of its size and channels, so nothing is downloaded."""
    spec = DATASETS[name]
    shape = (spec.size, spec.size) if spec.channels == 1 else (spec.size, spec.size, 3)
    rng = np.random.default_rng(0)
    return [(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), i % 2) for i in range(4)]


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_becomes_tensors_of_its_size_and_channels(name):
    train, valid = data_transforms(name, cutout_length=4)
    for image, _ in synthetic(name):
        for transform in (train, valid):
            tensor = transform(image)
            assert tensor.shape == (DATASETS[name].channels, DATASETS[name].size, DATASETS[name].size)
            assert tensor.dtype == torch.float32
        assert torch.equal(valid(image), valid(image))
    assert isinstance(train.transforms[-1], Cutout)
    assert not any(isinstance(transform, Cutout) for transform in valid.transforms)
    assert not any(isinstance(transform, Cutout) for transform in data_transforms(name, 0)[0].transforms)


@pytest.mark.parametrize(
    ("name", "flips"),
    [
        ("digits", False),
        ("mnist", False),
        ("kmnist", False),
        ("svhn", False),
        ("cifar10", True),
        ("cifar100", True),
        ("fashionmnist", True),
        ("folder", True),
    ],
)
def test_only_images_that_survive_it_are_flipped(name, flips):
    train, _ = data_transforms(name, 0)
    assert any(isinstance(transform, transforms.RandomHorizontalFlip) for transform in train.transforms) == flips


def test_augmentation_is_the_specified_one():
    crop = data_transforms("cifar10", 0)[0].transforms[0]
    assert (crop.size, crop.padding) == ((32, 32), 4)
    affine = data_transforms("mnist", 0)[0].transforms[0]
    assert (affine.degrees, affine.translate, affine.scale) == ([-15.0, 15.0], (0.1, 0.1), (0.9, 1.1))
    assert affine.shear == [-0.1, 0.1]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("mnist", (0.1307,), (0.3081,)),
        ("fashionmnist", (0.2860,), (0.3530,)),
    ],
)
def test_normalisation_is_the_published_one(name, mean, std):
    normalize = data_transforms(name, 0)[1].transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (mean, std)


def test_pixel_statistics_are_mean_and_standard_deviation_per_channel():
    source = synthetic("cifar10")
    pixels = np.stack([np.asarray(image) for image, _ in source]).reshape(-1, 3) / 255
    mean, std = pixel_statistics(source)
    assert mean == pytest.approx(pixels.mean(0), rel=1e-12)
    assert std == pytest.approx(pixels.std(0), rel=1e-9)
    assert pixel_statistics([(Image.new("L", (4, 4), 255), 0)]) == ((1.0,), (1.0,))


def test_computed_normalisation_leaves_mean_0_and_deviation_1():
    _, _, _, data = get_data("digits", "unused", 0, False)
    pixels = torch.stack([X for X, _ in data.without_augmentation()])
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)


def test_digits_are_all_there_in_two_disjoint_stratified_parts():
    size, channels, n_classes, train, test = get_data("digits", "unused", 0, True)
    assert (size, channels, n_classes, len(train), len(test)) == (8, 1, 10, 1437, 360)
    parts = [{np.asarray(image).tobytes() for image, _ in load_digits("", flag, 8, 1)[0]} for flag in (True, False)]
    assert len(parts[0] | parts[1]) == 1797
    assert not parts[0] & parts[1]
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.abs(share - 0.2).max() < 0.01


def test_cutout_sets_a_square_to_zero_clipped_at_the_border():
    torch.manual_seed(0)
    areas = set()
    for _ in range(300):
        img = torch.ones(2, 8, 8)
        cut = Cutout(4)(img)
        assert img.all()  # the image handed in is left alone
        assert torch.equal(cut[0], cut[1])
        rows, columns = (cut[0] == 0).any(1).sum().item(), (cut[0] == 0).any(0).sum().item()
        assert (cut[0] == 0).sum().item() == rows * columns
        areas.add((rows, columns))
    assert areas == {(r, c) for r in (2, 3, 4) for c in (2, 3, 4)}  # centres at the border leave half


def test_cutout_of_odd_length_and_of_none():
    cut = {(Cutout(3)(torch.ones(1, 9, 9)) == 0).sum().item() for _ in range(200)}
    assert cut == {4, 6, 9}
    img = torch.ones(1, 2, 2)
    assert Cutout(0)(img) is img


def test_default_cutout_leaves_something_of_small_images():
    data = get_data("digits", "unused", 16, False)[3]
    assert data.transform.transforms[-1].length == 4


@pytest.mark.parametrize("every", [2, 5])
def test_sorted_data_sets_are_split_by_class_and_by_chance(every):
    labels = [0] * 50 + [1] * 31 + [2] * 20
    first, rest = stratified_split(labels, every, seed=3)
    assert sorted([*first, *rest]) == list(range(101))
    assert abs(len(first) - 101 / every) < 1
    for c, n in enumerate((50, 31, 20)):
        assert abs(np.bincount(np.asarray(labels)[first])[c] - n / every) <= 1
    assert first.tolist() != stratified_split(labels, every, seed=4)[0].tolist()
    assert first.tolist() == stratified_split(labels, every, seed=3)[0].tolist()
    assert (np.diff(first) != every).any()  # by chance, not every second one in order


def test_folder_with_train_and_val(image_folder):
    size, channels, n_classes, train, val = get_data("folder", image_folder(), 0, True, image_size=10)
    assert (size, channels, n_classes, len(train), len(val)) == (10, 3, 2, 24, 24)
    assert train[3][0].shape == (3, 10, 10)


def test_folder_with_train_alone_is_split_and_may_be_grey(image_folder):
    root = image_folder(splits=("train",))
    size, channels, _, train, val = get_data("folder", root, 0, True, image_size=8, image_channels=1)
    assert (size, channels, len(train) + len(val)) == (8, 1, 24)
    assert not set(train.source.names) & set(val.source.names)
    assert train[0][0].shape == (1, 8, 8)
    assert get_data("folder", root, 0, False, image_size=8)[3].source.names == train.source.names


def test_folder_images_of_any_shape_and_mode_are_scaled_and_cropped_to_a_square(tmp_path):
    for mode, shape in (("RGBA", (40, 20)), ("L", (5, 9)), ("P", (10, 10)), ("CMYK", (11, 10))):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, shape).save(path)
        image = data_sets.open_image(path, 10, "RGB")
        assert (image.size, image.mode) == ((10, 10), "RGB")


def test_folders_that_cannot_be_used_say_why(image_folder, tmp_path):
    cases = [
        (tmp_path / "none", "does not exist"),
        (image_folder(tmp_path / "one", classes=("left",)), "one class"),
    ]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "noimages" / "train" / "a").mkdir(parents=True)
    cases += [(tmp_path / "empty", "no class"), (tmp_path / "noimages", "one class, a")]
    image_folder(tmp_path / "half", splits=("train",))
    (tmp_path / "half" / "train" / "up").mkdir()
    cases += [(tmp_path / "half", "no image of up; files of images end in .bmp")]
    for root, mention in cases:
        with pytest.raises(UserError, match=mention):
            get_data("folder", root, 0, False)
    root = image_folder(tmp_path / "differ", splits=("train",))
    image_folder(root, splits=("val",), classes=("left", "up"))
    with pytest.raises(UserError, match=r"same classes.*right, up"):
        get_data("folder", root, 0, True)
    (root / "train" / "left" / "zzz.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"zzz\.png"):
        get_data("folder", root, 0, False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "kmnist", "fashionmnist"])
def test_missing_data_without_network_says_what_where_and_what_works_offline(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError) as error:
        get_data(name, tmp_path / "data", 0, False)
    for mention in (name, str(tmp_path / "data"), "digits", "folder"):
        assert mention.lower() in str(error.value).lower()


def test_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="cifar10"):
        get_data("imagenot", "data", 0, False)
    with pytest.raises(ValueError, match="cifar10"):
        data_transforms("imagenot", 0)


def test_images_come_in_the_order_of_torchvision(tmp_path):
    for name in ("b/9.png", "a/x/1.png", "a/x-y/2.png", "a/3.PNG", "a/x/z/4.jpeg", "a/10.png", "B/5.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder, reference = list_folder(tmp_path, read=None), datasets.ImageFolder(tmp_path)
    assert folder.classes == reference.classes
    assert [(str(tmp_path / name), label) for name, label in zip(folder.names, folder.labels)] == reference.samples


def test_what_is_no_class_and_no_image_is_left_out_with_a_warning_that_counts_it(image_folder, capsys):
    root = image_folder()
    train = root / "train"
    expected = get_data("folder", root, 0, False)[3].source.names
    assert capsys.readouterr().err == ""
    for name in (
        ".ipynb_checkpoints/left-checkpoint.png",
        "__MACOSX/left/._1.jpg",
        "left/._000.png",
        "left/.hidden/1.png",
        "right/__MACOSX/1.png",
        "left/@eaDir/000.png/thumbnail.jpg",
        "left/notes.txt",
        "left/animal.gif",
        "loose.png",
        "left/Thumbs.db",
        "left/.DS_Store",
        ".DS_Store",
    ):
        (train / name).parent.mkdir(exist_ok=True, parents=True)
        (train / name).write_bytes(b"no image")
    os.mkfifo(train / "left" / "pipe.png")
    (train / "right" / "gone.png").symlink_to(train / "nowhere.png")
    *_, n_classes, data = get_data("folder", root, 0, False)
    assert (n_classes, data.source.names) == (2, expected)
    (line,) = capsys.readouterr().err.splitlines()
    for words in (
        "warning: ",
        "6 hidden, first .ipynb_checkpoints",
        "2 that are no files, first left/pipe.png",
        "2 whose names do not end as an image's, first left/animal.gif",
        "1 in no class's folder, first loose.png",
    ):
        assert words in line
    assert "Thumbs" not in line
    get_data("folder", root, 0, False)
    assert capsys.readouterr().err == ""  # said once


def test_links_within_the_folder_are_followed_but_not_around_in_circles(image_folder, capsys):
    root = image_folder()
    (root / "train" / "left" / "000.png").rename(root / "val" / "a.png")
    (root / "train" / "left" / "000.png").symlink_to(root / "val" / "a.png")
    for i in range(3):
        (root / "train" / "left" / f"loop{i}").symlink_to("..")
        (root / "train" / "right" / f"loop{i}").symlink_to(".")
    (root / "train" / "right" / "more").symlink_to(root / "val")
    (root / "val" / "back").symlink_to(root)
    (root / "train" / "left" / "self.png").symlink_to("self.png")
    (root / "train" / "self").symlink_to("self")
    root.with_name("link").symlink_to(root)
    for path in (root, root.with_name("link")):
        folder = list_folder(path / "train", read=None, data_path=path)
        assert np.bincount(folder.labels).tolist() == [12, 12 + 1 + 24]
        assert folder.names[12 + 12] == "right/more/a.png"
        said = capsys.readouterr().err
        assert "7 links back to a folder, first left/loop0" in said
        assert "2 that are no files, first left/self.png" in said


@pytest.mark.parametrize(
    ("names", "mention"),
    [
        (("test", "valid", ".git", "__MACOSX"), "not test, valid, and without val/ a fifth of train/ is held out"),
        (("val", "test"), "only train/ and val/ are read, not test"),
        (("Val",), "not Val, and without val/ a fifth of train/ is held out"),
    ],
)
def test_folders_beside_train_that_nothing_reads_are_named_in_a_warning(names, mention, image_folder, capsys):
    root = image_folder(splits=("train",))
    for name in names:
        shutil.copytree(root / "train", root / name)
    get_data("folder", root, 0, True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "only train/" in line]
    assert len(lines) == 1
    assert lines[0].endswith(mention)


def test_a_class_folder_whose_name_is_no_utf8_gets_a_name_that_can_be_printed(image_folder):
    root = image_folder()
    for split in ("train", "val"):
        (root / split / "left").rename(os.fsdecode(os.fsencode(root / split) + b"/l\xe9ft"))
    *_, train, val = get_data("folder", root, 0, True)
    assert train.class_names(2) == val.class_names(2) == ["l\\xe9ft", "right"]
    assert train[0][0].shape == (3, 32, 32)
    assert train.fingerprint()["classes"] == {"l\\xe9ft": 12, "right": 12}


def test_training_images_of_one_value_are_warned_of_by_channel(image_folder, capsys):
    root = image_folder(splits=("train",))
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            red, _, blue = image.split()
        Image.merge("RGB", (red, Image.new("L", red.size, 255), blue)).save(path)
    get_data("folder", root, 0, False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "every pixel" in line]
    assert "green is 255 of 255 in every pixel" in line


def test_images_added_to_a_folder_without_val_move_no_other_between_training_and_test():
    names = [f"{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(100)]
    labels = [0] * 100 + [1] * 100
    before = dict(zip(names, held_out_by_name(names, labels)))
    more = [*names[:100], "cat/new.png", *names[100:], *(f"dog/{i}.png" for i in range(50))]
    after = dict(zip(more, held_out_by_name(more, [0] * 101 + [1] * 150)))
    assert {name: after[name] for name in names} == before
    assert abs(sum(after.values()) / len(after) - 0.2) < 0.08  # three standard deviations


def test_each_class_has_training_and_test_images_however_few_it_has():
    names = [f"{label}/{i}.png" for label in range(400) for i in range(5)]
    labels = [label for label in range(400) for _ in range(5)]
    in_test = held_out_by_name(names, labels)
    per_class = np.bincount(labels, weights=in_test)
    assert per_class.min() == 1
    assert per_class.max() <= 4
    order = np.random.default_rng(0).permutation(len(names))  # decided by name, not by place
    assert (held_out_by_name([names[i] for i in order], [labels[i] for i in order]) == in_test[order]).all()


def test_runs_from_before_keep_the_fifth_that_they_held_out(image_folder):
    root = image_folder(splits=("train",))
    *_, train, test = get_data("folder", root, 0, True, hold_out_by_name=False)
    expected = stratified_split([0] * 12 + [1] * 12, 5, seed=0)
    names = list_folder(root / "train", read=None).names
    assert [names.index(name) for name in test.source.names] == expected[0].tolist()
    assert [names.index(name) for name in train.source.names] == expected[1].tolist()


def test_test_images_are_read_without_train(image_folder):
    root = image_folder()
    *_, val = get_data("folder", root, 0, True)
    shutil.rmtree(root / "train")
    test = get_test_data("folder", root, val.normalisation())
    assert test.fingerprint() == val.fingerprint()
    assert torch.equal(test[5][0], val[5][0])


def fingerprint(root):
    return get_data("folder", root, 0, False, image_size=8)[3].fingerprint()


def rename_class(train):
    (train / "left").rename(train / "zzz")


def add_image(train):
    shutil.copy(train / "right" / "000.png", train / "right" / "new.png")


def move_to_another_class(train):
    (train / "right" / "000.png").rename(train / "left" / "new.png")


def rename_image(train):
    (train / "right" / "000.png").rename(train / "right" / "new.png")


def remove_class(train):
    shutil.rmtree(train / "left")


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (rename_class, "without class left; with new class zzz"),
        (add_image, "images: 13 of right, not 12"),
        (move_to_another_class, "images: 13 of left, not 12, 11 of right, not 12"),
        (rename_image, "other names or labels"),
        (remove_class, "without class left"),
    ],
)
def test_images_that_changed_under_a_run_are_refused_by_what_differs(change, mention, image_folder):
    root = image_folder(classes=("left", "right", "up"))
    before = fingerprint(root)
    data = {"training": get_data("folder", root, 0, False)[3]}
    check_unchanged(data, {"data": {"training": before}})
    check_unchanged(data, {})  # of a run from before there were fingerprints
    change(root / "train")
    data = {"training": get_data("folder", root, 0, False)[3]}
    with pytest.raises(UserError, match=f"the training images .*{mention}"):
        check_unchanged(data, {"data": {"training": before}})


def test_images_that_only_moved_are_the_same(image_folder, tmp_path):
    root = image_folder()
    before = fingerprint(root)
    assert before == {"classes": {"left": 12, "right": 12}, "sha256": before["sha256"]}
    assert fingerprint(root.rename(tmp_path / "moved")) == before


def test_every_data_set_has_a_fingerprint_of_its_labels():
    data = get_data("digits", "", 0, True)
    assert sum(data[3].fingerprint()["classes"].values()) == 1437
    assert data[3].fingerprint() != data[4].fingerprint()
    labels = [0, 1, 1, 0]
    one, other = (Images(None, labels, None, None, seed=0).fingerprint() for labels in (labels, labels[::-1]))
    assert one == other
    assert Images(None, [0, 1, 0, 1], None, None, seed=0).fingerprint() != one


def test_a_fingerprint_and_a_split_read_no_pixels(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "train" / name / f"{i}.png").touch()
    folder, labels, _ = DATASETS["folder"].load(tmp_path, False, 8, 3)
    assert sum(Images(folder, labels, None, None, seed=0).fingerprint()["classes"].values()) == len(folder)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def raw_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.zeros((10, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(10))
    return raw


def test_raw_files_of_mnist_are_read(raw_mnist, tmp_path):
    size, channels, n_classes, train, test = get_data("mnist", tmp_path, 0, True)
    assert (size, channels, n_classes, len(train), len(test)) == (28, 1, 10, 10, 10)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("length", [0, 3, 4, 9, 17])
def test_a_damaged_raw_file_of_mnist_is_named_with_what_to_do(name, length, raw_mnist, tmp_path):
    (raw_mnist / name).write_bytes((raw_mnist / name).read_bytes()[:length])
    with pytest.raises(UserError, match=rf"{name} is damaged .* delete it") as error:
        get_data("mnist", tmp_path, 0, True)
    assert len(str(error.value).splitlines()) == 1
