import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from command_line.errors import UserError
from images.data_sets import DATASETS, load_digits, pixel_statistics, stratified_split
from images.image_folder import list_folder
from images.loading import check_unchanged
from preproc import Cutout, data_transforms
from utils import get_data, get_test_data


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
    for transform in (valid, data_transforms(name, 0)[0]):
        assert "Cutout" not in str(transform)


def test_augmentation_and_normalisation_are_the_specified_ones():
    transforms_of = {name: data_transforms(name, 0)[0].transforms for name in DATASETS}
    flipped = {name for name, steps in transforms_of.items() if "Flip" in str(steps)}
    assert flipped == {"cifar10", "cifar100", "fashionmnist", "folder"}  # whose classes survive it
    crop, affine = transforms_of["cifar10"][0], transforms_of["mnist"][0]
    assert (crop.size, crop.padding) == ((32, 32), 4)
    assert (affine.degrees, affine.translate, affine.scale) == ([-15.0, 15.0], (0.1, 0.1), (0.9, 1.1))
    assert affine.shear == [-0.1, 0.1]
    for name, mean, std in (
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("mnist", (0.1307,), (0.3081,)),
        ("fashionmnist", (0.2860,), (0.3530,)),
    ):
        normalize = transforms_of[name][-1]
        assert (tuple(normalize.mean), tuple(normalize.std)) == (mean, std)


def test_normalisation_leaves_mean_0_and_deviation_1_of_each_channel():
    source = synthetic("cifar10")
    pixels = np.stack([np.asarray(image) for image, _ in source]).reshape(-1, 3) / 255
    mean, std = pixel_statistics(source)
    assert mean == pytest.approx(pixels.mean(0), rel=1e-12)
    assert std == pytest.approx(pixels.std(0), rel=1e-9)
    pixels = torch.stack([X for X, _ in get_data("digits", "unused", 0, False)[3].without_augmentation()])
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1, abs=1e-4)
    assert pixel_statistics([(Image.new("L", (4, 4), 255), 0)]) == ((1.0,), (1.0,))  # not divided by zero


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


def test_folders_that_cannot_be_used_say_why(image_folder, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    image_folder(tmp_path / "one", classes=("left",))
    image_folder(tmp_path / "half", splits=("train",))
    (tmp_path / "half" / "train" / "up").mkdir()
    image_folder(tmp_path / "single", splits=("train",), n=1)
    image_folder(tmp_path / "differ", splits=("train",))
    image_folder(tmp_path / "differ", splits=("val",), classes=("left", "up"))
    for name, mention in {
        "none": "does not exist",
        "empty": "no class",
        "one": "one class, left",
        "half": "no image of up",
        "single": "000.png is the only image of its class",
        "differ": "same classes.*right, up",
    }.items():
        with pytest.raises(UserError, match=mention):
            get_data("folder", tmp_path / name, 0, True)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "kmnist", "fashionmnist"])
def test_missing_data_without_network_says_what_where_and_what_works_offline(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=f"(?i){name}.*{tmp_path / 'data'}"):
        get_data(name, tmp_path / "data", 0, False)


def test_images_come_in_the_order_of_torchvision(tmp_path):
    for name in ("b/9.png", "a/x/1.png", "a/x-y/2.png", "a/3.PNG", "a/x/z/4.jpeg", "a/10.png", "B/5.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder, reference = list_folder(tmp_path, 8, "RGB"), datasets.ImageFolder(tmp_path)
    assert folder.classes == reference.classes
    assert [(str(tmp_path / name), label) for name, label in zip(folder.names, folder.labels)] == reference.samples


def test_hidden_names_are_left_out_and_a_warning_names_all_else(image_folder, capsys):
    root = image_folder()
    train = root / "train"
    expected = get_data("folder", root, 0, False)[3].source.names
    hidden = (".ipynb_checkpoints/x.png", "__MACOSX/left/._1.jpg", "left/._000.png", "left/@eaDir/1.png/thumb.jpg")
    named = ("left/notes.txt", "left/animal.gif", "loose.png")
    for name in (*hidden, ".DS_Store", "left/Thumbs.db", *named):
        (train / name).parent.mkdir(exist_ok=True, parents=True)
        (train / name).write_bytes(b"not an image")
    *_, n_classes, data = get_data("folder", root, 0, False)
    assert (n_classes, data.source.names) == (2, expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": left/animal.gif, left/notes.txt, loose.png")


def test_links_are_followed_wherever_they_lead_but_not_around_in_circles(image_folder, tmp_path, capsys):
    """Images, classes and train/ may be on another disk."""
    elsewhere = image_folder(tmp_path / "elsewhere", classes=("left", "up"))
    root = image_folder()
    left = root / "train" / "left"
    (left / "000.png").unlink()
    (left / "000.png").symlink_to(elsewhere / "train" / "up" / "000.png")
    (left / "more").symlink_to(elsewhere / "train" / "left")
    (root / "train" / "up").symlink_to(elsewhere / "train" / "up")
    for name, target in (("loop", "."), ("train", ".."), ("gone.png", "nowhere")):
        (left / name).symlink_to(target)
    (root / "train").rename(tmp_path / "train")
    (root / "train").symlink_to(tmp_path / "train")
    *_, n_classes, data = get_data("folder", root, 0, False)
    assert (n_classes, np.bincount(data.labels).tolist()) == (3, [24, 12, 12])
    assert data.source.names[12] == "left/more/000.png"
    assert data.source[0][0] == data.source[36][0]  # left/000.png and up/000.png
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": left/gone.png, left/loop, left/train")


@pytest.mark.parametrize("crops", [False, True])
def test_the_augmentation_of_any_data_set_can_be_chosen(crops, image_folder):
    options = {"image_size": 16, "image_channels": 1, "crops": crops}
    root = image_folder()
    size, channels, n_classes, data = get_data("folder", root, 0, False, augmentation="none", **options)
    assert (size, channels, n_classes, data[0][0].shape) == (16, 1, 2, (1, 16, 16))
    assert torch.equal(data[1, 0][0], data.without_augmentation()[0][0])
    *_, flipped = get_data("folder", root, 0, False, augmentation="flip", **options)
    views, plain = torch.stack([flipped[epoch, 0][0] for epoch in range(20)]), data[0][0]
    assert torch.equal(views.unique(dim=0), torch.stack([plain, plain.flip(2)]).unique(dim=0))
    *_, moved = get_data("digits", "", 0, False, augmentation="crop+affine")
    assert "RandomCrop" in str(moved.transform)
    assert "RandomAffine" in str(moved.transform)


def test_test_images_are_read_without_train(image_folder):
    root = image_folder()
    *_, val = get_data("folder", root, 0, True)
    shutil.rmtree(root / "train")
    test = get_test_data("folder", root, val.normalisation())
    assert test.fingerprint() == val.fingerprint()
    assert torch.equal(test[5][0], val[5][0])


@pytest.mark.parametrize(
    ("before", "after", "mention"),
    [
        ("left", "zzz", "left 12 -> 0, zzz 0 -> 12"),
        ("right/000.png", "left/new.png", "left 12 -> 13, right 12 -> 11"),
        ("right/000.png", "right/new.png", "other names or labels"),
    ],
)
def test_images_that_changed_under_a_run_are_refused_by_what_differs(before, after, mention, image_folder, tmp_path):
    root = image_folder(classes=("left", "right", "up"))
    data = get_data("folder", root, 0, False)[3]
    saved = {"training": data.fingerprint()}
    assert saved["training"]["classes"] == {"left": 12, "right": 12, "up": 12}
    root = root.rename(tmp_path / "moved")
    check_unchanged({"training": get_data("folder", root, 0, False)[3].fingerprint()}, saved)
    (root / "train" / before).rename(root / "train" / after)
    with pytest.raises(UserError, match=f"the training images .*{mention}"):
        check_unchanged({"training": get_data("folder", root, 0, False)[3].fingerprint()}, saved)


def test_mnist_is_read_and_damaged_files_are_one_line(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", np.zeros((10, 28, 28))), ("labels-idx1", np.arange(10))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    size, channels, n_classes, train, test = get_data("mnist", tmp_path, 0, True)
    assert (size, channels, n_classes, len(train), len(test)) == (28, 1, 10, 10, 10)
    file = raw / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:17])
    with pytest.raises(UserError, match=f"{tmp_path}.*delete"):
        get_data("mnist", tmp_path, 0, True)


def test_class_names_that_look_alike_are_told_apart(image_folder):
    root = image_folder(splits=("train",), classes=("Gr\u00f6\u00dfe", "a", "b"))
    image_folder(root, splits=("val",), classes=("Gro\u0308\u00dfe", "a ", "c"))
    with pytest.raises(UserError) as error:
        get_data("folder", root, 0, validation=True)
    assert str(error.value).endswith("only one has 'Gro\\u0308\\xdfe', 'Gr\\xf6\\xdfe', 'a', 'a ', b, c")
