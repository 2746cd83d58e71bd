import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from preproc import Cutout, data_transforms
from running import data_sets
from running.data_sets import DATASETS, load_digits, pixel_statistics, stratified_split
from running.errors import UserError
from running.loading import Batches, Images, Loader
from utils import get_data

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


@pytest.mark.parametrize(("name", "flips"), [
    ("digits", False), ("mnist", False), ("kmnist", False), ("svhn", False),
    ("cifar10", True), ("cifar100", True), ("fashionmnist", True), ("folder", True),
])  # fmt: skip
def test_only_images_that_survive_it_are_flipped(name, flips):
    train, _ = data_transforms(name, 0)
    assert any(isinstance(transform, transforms.RandomHorizontalFlip) for transform in train.transforms) == flips


def test_augmentation_is_the_specified_one():
    crop = data_transforms("cifar10", 0)[0].transforms[0]
    assert (crop.size, crop.padding) == ((32, 32), 4)
    affine = data_transforms("mnist", 0)[0].transforms[0]
    assert (affine.degrees, affine.translate, affine.scale) == ([-15.0, 15.0], (0.1, 0.1), (0.9, 1.1))
    assert affine.shear == [-0.1, 0.1]


@pytest.mark.parametrize(("name", "mean", "std"), [
    ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("mnist", (0.1307,), (0.3081,)), ("fashionmnist", (0.2860,), (0.3530,)),
])  # fmt: skip
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


def loaded(workers, epochs=(1, 2), shuffle=True, seed=0):
    data = get_data("digits", "unused", 4, False, seed=seed)[3]
    loader = Loader(data, range(60), 16, CPU, workers, shuffle, seed)
    return [[(X.clone(), y.clone()) for X, y, _ in loader.epoch(epoch)] for epoch in epochs]


def test_batches_are_the_same_for_every_number_of_workers():
    for workers in (1, 2):
        for one, other in zip(loaded(0), loaded(workers)):
            assert len(one) == len(other) == 4
            for (X, y), (X_other, y_other) in zip(one, other):
                assert torch.equal(X, X_other)
                assert torch.equal(y, y_other)


def test_batches_of_an_epoch_do_not_depend_on_the_epochs_before():
    for (X, _), (X_other, _) in zip(loaded(0, epochs=(2,))[0], loaded(0)[1]):
        assert torch.equal(X, X_other)


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded(0)
    loaded(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_by_seed_epoch_and_sample():
    image = synthetic("cifar10")[0]
    data = Images([image] * 2, [0, 0], data_transforms("cifar10", 16)[0], None, seed=1)
    other = Images([image] * 2, [0, 0], data_transforms("cifar10", 16)[0], None, seed=2)
    views = [data[1, 0][0], data[1, 1][0], data[2, 0][0], other[1, 0][0]]
    for i, a in enumerate(views):
        assert all(not torch.equal(a, b) for b in views[i + 1 :])
    assert torch.equal(data[1, 1][0], views[1])
    assert torch.equal(data[0][0], data[0, 0][0])


def test_each_epoch_has_every_sample_once_in_another_order():
    batches = Batches(range(10, 43), 8, shuffle=True, seed=0)
    orders = []
    for epoch in (1, 2):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        orders.append([sample for _, sample in keys])
    # 33 samples in eights leave one over: BN has no statistics of a single value, so training skips it
    assert len(batches) == 4
    assert all(len(set(order)) == 32 for order in orders)
    assert orders[0] != orders[1]
    plain = Batches(range(10, 43), 8, shuffle=False, seed=0)
    assert [s for batch in plain for _, s in batch] == list(range(10, 43))
    assert len(plain) == 5
    assert len(Batches(range(5), 8, True, 0)) == 1
    assert len(Batches(range(5), 1, True, 0)) == 5
    with pytest.raises(UserError, match="too few images"):
        Loader(get_data("digits", "", 0, False)[3], [3], 8, CPU)


def test_folder_with_train_and_val(image_folder):
    size, channels, n_classes, train, val = get_data("folder", image_folder(), 0, True, image_size=10)
    assert (size, channels, n_classes, len(train), len(val)) == (10, 3, 2, 24, 24)
    assert train[3][0].shape == (3, 10, 10)


def test_folder_with_train_alone_is_split_and_may_be_grey(image_folder):
    root = image_folder(splits=("train",))
    size, channels, _, train, val = get_data("folder", root, 0, True, image_size=8, image_channels=1)
    assert (size, channels, len(train), len(val)) == (8, 1, 19, 5)
    assert train[0][0].shape == (1, 8, 8)
    assert len(get_data("folder", root, 0, False, image_size=8)[3]) == 19


def test_folder_images_of_any_shape_and_mode_are_scaled_and_cropped_to_a_square(tmp_path):
    for mode, shape in (("RGBA", (40, 20)), ("L", (5, 9)), ("P", (10, 10)), ("CMYK", (11, 10))):
        path = tmp_path / f"{mode}.tif"
        Image.new(mode, shape).save(path)
        image = data_sets.open_image(path, 10, "RGB")
        assert (image.size, image.mode) == ((10, 10), "RGB")


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert data_sets.open_image(tmp_path / "deep.png", 8, "L").getextrema() == (128, 128)


def test_folders_that_cannot_be_used_say_why(image_folder, tmp_path):
    cases = [
        (tmp_path / "none", "does not exist"),
        (image_folder(tmp_path / "one", classes=("left",)), "one class"),
    ]
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "noimages" / "train" / "a").mkdir(parents=True)
    cases += [(tmp_path / "empty", "each class"), (tmp_path / "noimages", "each class")]
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
