"""Exported networks: the file gives the trained network's logits, without this code."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import assert_one_line_error, run_script
from PIL import Image

from command_line.errors import UserError
from genotypes import DARTS_V1, Genotype
from models.augment_cnn import AugmentCNN
from models.ops import OPS
from trained.evaluation import evaluate, images_of, load_network, load_trained
from trained.exporting import compare, export

TINY = ("--layers", 3, "--init-channels", 4, "--batch-size", 8, "--epochs", 2, "--workers", 0, "--genotype", "DARTS_V2")


@pytest.mark.process
def test_the_file_is_enough_to_classify_images(tmp_path, image_folder):
    root = image_folder(size=16)
    data = ("--dataset", "folder", "--data-path", root, "--image-size", 16)
    process = run_script("augment.py", *data, *TINY, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "runs/augment/folder"
    for words in ((), ("--output", tmp_path / "model.pt2")):
        process = run_script("export.py", run, *words, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert "test images: 24 images, 1 and 7 at once" in process.stdout
        assert "24 of the same class" in process.stdout

    session = onnxruntime.InferenceSession(run / "best.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["left", "right"]
    files = {"about.json": ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["about.json"]) == metadata

    expected = evaluate(run).probabilities  # by the data set's own transforms
    images = [Image.open(path) for path in sorted((root / "val").rglob("*.png"))]
    pixels = np.stack([np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 for image in images])
    for n in (1, 7, 24):
        batches = [pixels[i : i + n] for i in range(0, len(pixels), n)]
        for classify in (lambda x: session.run(None, {"images": x})[0], lambda x: module(torch.from_numpy(x)).detach()):
            logits = torch.cat([torch.as_tensor(classify(batch)) for batch in batches])
            np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-4)

    for words, mention in (
        (("--output", "x/y.pt2"), "no folder x"),
        (("--output", "x.pb"), ".onnx or .pt2"),
        (("--output", "lost.onnx", "--data-path", "nowhere"), "nowhere"),
    ):
        assert_one_line_error(run_script("export.py", run, *words, cwd=tmp_path), mention)
    assert not list(tmp_path.glob("lost*"))

    trained = load_trained(run)
    net, images = load_network(trained, torch.device("cpu")), images_of(trained)
    for wrong in (1e-2, np.nan):
        with pytest.raises(RuntimeError, match="differ"):
            compare(lambda x, wrong=wrong: session.run(None, {"images": x})[0] + np.float32(wrong), net, images)


@pytest.mark.process
def test_large_grey_images_of_which_few_are_there(tmp_path, image_folder):
    root = image_folder(size=80, mode="L", splits=("train",))
    image_folder(size=80, mode="L", splits=("val",), n=2)
    data = ("--dataset", "folder", "--data-path", root, "--image-size", 64, "--image-channels", 1)
    process = run_script("augment.py", *data, *TINY, "--epochs", 1, "--stem", "imagenet", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    process = run_script("export.py", "runs/augment/folder", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "test images: 4 images" in process.stdout
    assert "4 of the same class" in process.stdout
    metadata = onnxruntime.InferenceSession(tmp_path / "runs/augment/folder/best.onnx").get_modelmeta()
    assert "(N, 1, 64, 64): grey" in metadata.custom_metadata_map["input"]


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
    classify = export(net, results, tmp_path / "all.onnx")
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
        export(net, results, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
