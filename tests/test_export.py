"""Exported networks: the file gives the trained network's logits, without this code."""

import re
import runpy
import sys
import zipfile

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from PIL import ExifTags, Image
from short_runs import command, refused

import augment
import export
from command_line.errors import UserError
from genotypes import DARTS_V1, Genotype
from models.augment_cnn import AugmentCNN
from models.ops import OPS
from trained import exporting
from trained.evaluation import evaluate, images_of, load_network, load_trained

TINY = ("--layers", 3, "--init-channels", 4, "--batch-size", 8, "--workers", 0, "--genotype", "DARTS_V2")


def trained_run(tmp_path, root, *words):
    """The folder of a run on the images in `root`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("augment.describe_latency", lambda *args: "no time")
        data = ("--dataset", "folder", "--data-path", root, "--device", "cpu", "--runs-path", tmp_path)
        assert command(augment.main, [*data, *TINY, "--epochs", 1, *words]) == 0
    return tmp_path / "augment/folder"


def save_odd_images(folder):
    """A turned photo, a long one, 16-bit grey levels, and transparent colours."""
    noise = np.random.default_rng(0)
    photo = Image.fromarray(noise.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    photo.resize((90, 31)).save(folder / "long.webp", lossless=True)
    Image.fromarray(noise.integers(0, 65536, (24, 24), dtype=np.uint16)).save(folder / "grey.png")
    Image.fromarray(noise.integers(0, 256, (33, 24, 4), dtype=np.uint8)).save(folder / "transparent.png")


def test_image_files_are_classified_as_the_docs_show(tmp_path, image_folder, capsys):
    root = image_folder(size=16)
    save_odd_images(root / "val/left")
    run, model = trained_run(tmp_path, root, "--image-size", 16), tmp_path / "model.pt2"
    for words in ([run], [run / "best.pt", "--output", model]):
        assert command(export.main, words) == 0
        output = capsys.readouterr().out
        assert "test images: 28 images, 1 and 7 at once" in output
        assert "28 of the same class" in output
        assert ("chosen for its accuracy on the test images" in output) == (words[0] != run)
    with zipfile.ZipFile(model) as archive:
        content = b"".join(map(archive.read, archive.namelist())) + (run / "checkpoint.onnx").read_bytes()
    assert str(ROOT).encode() not in content  # nor any other path of this machine
    assert b"site-packages" not in content

    onnx_example, pt2_example = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/cells.md").read_text(encoding="utf-8"), re.DOTALL
    )
    onnx_example = onnx_example.replace("runs/augment/folder", str(run))
    pt2_example = pt2_example.replace("model.pt2", str(model))
    evaluation = evaluate(run)
    for name, expected in zip(evaluation.images.source.names, evaluation.probabilities):
        variables = {"torch": torch}
        for example in (onnx_example.replace("image.png", f"{root}/val/{name}"), pt2_example):
            (tmp_path / "example.py").write_text(example)
            variables = runpy.run_path(str(tmp_path / "example.py"), variables)
            assert variables["classes"] == ["left", "right"]
            probabilities = torch.from_numpy(variables["logits"]).softmax(1)[0]
            np.testing.assert_allclose(probabilities, expected, atol=1e-4, err_msg=name)


def test_a_file_of_other_logits_is_refused(tmp_path, image_folder, capsys):
    run = trained_run(tmp_path, image_folder(size=8), "--image-size", 8)
    refused(capsys, export.main, [run, "--output", tmp_path / "x/y.pt2"], "no folder")
    refused(capsys, export.main, [run, "--output", "x.pb"], ".onnx or .pt2")
    trained = load_trained(run)
    net, (images, _) = load_network(trained, torch.device("cpu")), images_of(trained)
    exported = exporting.export(net, trained.results, tmp_path / "x.pt2")
    for error in (1e-2, np.nan):
        with pytest.raises(RuntimeError, match="differ"):
            exporting.compare(lambda x, error=error: exported(x) + np.float32(error), net, images)


def test_large_grey_images_with_the_imagenet_stem(tmp_path, image_folder, capsys):
    root = image_folder(size=80, mode="L", splits=("train",))
    image_folder(size=80, mode="L", splits=("val",), n=2)
    words = ("--image-size", 64, "--image-channels", 1, "--stem", "imagenet")
    refused(
        capsys, augment.main, [*words[2:], *TINY, "--dataset", "folder", "--data-path", root, "--image-size", 63], "64"
    )
    run = trained_run(tmp_path, root, *words, "--epochs", 2)
    output = capsys.readouterr().out
    assert "RandomResizedCrop" in output
    assert "lr 0.09700" in output  # 0.1 x 0.97 in the second epoch
    assert command(export.main, [run]) == 0
    assert "test images: 4 images" in capsys.readouterr().out
    metadata = onnxruntime.InferenceSession(run / "checkpoint.onnx").get_modelmeta().custom_metadata_map
    assert "(N, 1, 64, 64): grey" in metadata["input"]
    assert "mode L" in metadata["preprocessing"]


@pytest.mark.long
def test_every_operation_can_be_exported_at_odd_sizes_and_any_batch(tmp_path):
    ops = [name for name in OPS if name != "none"]
    gene = [[(name, 0), (name, 1)] for name in ops]
    concat = range(2, 2 + len(ops))
    torch.manual_seed(0)
    net = AugmentCNN(15, 3, 4, 5, 3, True, Genotype(gene, concat, gene, concat)).eval()
    net = net.to(memory_format=torch.channels_last)
    results = {
        "input_size": 15,
        "input_channels": 3,
        "classes": list("abcde"),
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "genotype": "-",
        "preprocessing": "-",
    }
    classify = exporting.export(net, results, tmp_path / "all.onnx")
    mean, std = (torch.tensor(results[name]).view(3, 1, 1) for name in ("mean", "std"))
    for n in (1, 2, 7):
        images = torch.rand(n, 3, 15, 15)
        with torch.no_grad():
            expected = net((images - mean) / std)[0].numpy()
        np.testing.assert_allclose(classify(images.numpy()), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_that_onnx_needs_the_error_says_what_to_install(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    net = AugmentCNN(8, 1, 2, 2, 1, False, DARTS_V1)
    results = {"input_size": 8, "input_channels": 1, "mean": [0.5], "std": [0.2], "preprocessing": "-"}
    results |= {"classes": ["a", "b"], "genotype": "-"}
    with pytest.raises(UserError, match=rf"{missing}: .*requirements-export\.txt; a \.pt2"):
        exporting.export(net, results, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
