"""Exported networks: the file alone says of images what the trained network says."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import assert_one_line_error, run_script
from PIL import Image

from export import Classifier, check, read_onnx, write_onnx
from genotypes import Genotype
from models.augment_cnn import AugmentCNN
from models.ops import OPS
from running.evaluation import evaluate, images_of, load_network, load_trained

TINY = ("--layers", 3, "--init-channels", 4, "--batch-size", 8, "--epochs", 2, "--workers", 0, "--genotype", "DARTS_V2")


def test_the_file_is_enough_to_classify_images(tmp_path, image_folder):
    root = image_folder(size=16)
    data = ("--dataset", "folder", "--data-path", root, "--image-size", 16)
    process = run_script("augment.py", *data, *TINY, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "runs/augment/folder"
    for words in ((), ("--output", tmp_path / "model.pt2")):
        process = run_script("export.py", run, *words, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        assert "24 test images, 1 and 7 at once" in process.stdout
        assert "24 of the same class" in process.stdout

    session = onnxruntime.InferenceSession(run / "best.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["left", "right"]
    files = {"about.json": ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=files).module()
    assert json.loads(files["about.json"]) == about

    expected = evaluate(run).probabilities  # by the data set's own transforms
    images = [Image.open(path) for path in sorted((root / "val").rglob("*.png"))]
    pixels = np.stack([np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 for image in images])
    for n in (1, 7, 24):
        batches = [pixels[i : i + n] for i in range(0, len(pixels), n)]
        for classify in (lambda x: session.run(None, {"images": x})[0], lambda x: module(torch.from_numpy(x)).detach()):
            logits = torch.cat([torch.as_tensor(classify(batch)) for batch in batches])
            np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-4)

    assert_one_line_error(run_script("export.py", run, "--output", "x/y.pt2", cwd=tmp_path), "no folder x")
    (root / "val/left").rename(root / "val/other")
    (root / "train/left").rename(root / "train/other")
    assert_one_line_error(run_script("augment.py", "--evaluate", run, cwd=tmp_path), "left, right")
    (root / "val/other").rename(root / "val/left")
    (root / "train/other").rename(root / "train/left")

    words = (run, "--output", tmp_path / "lost.onnx", "--data-path", tmp_path / "nowhere")
    assert_one_line_error(run_script("export.py", *words, cwd=tmp_path), "nowhere")
    assert not list(tmp_path.glob("lost*"))
    assert_one_line_error(run_script("export.py", run, "--output", "x.pb", cwd=tmp_path), ".onnx or .pt2")

    checkpoint = load_trained(run)
    net, images = load_network(checkpoint, torch.device("cpu")), images_of(checkpoint)
    with pytest.raises(RuntimeError, match="differ"):
        check(lambda x: session.run(None, {"images": x})[0] + 1e-2, net, images)


def test_large_grey_images_of_which_few_are_there(tmp_path, image_folder):
    root = image_folder(size=80, mode="L", splits=("train",))
    image_folder(size=80, mode="L", splits=("val",), n=2)
    data = ("--dataset", "folder", "--data-path", root, "--image-size", 64, "--image-channels", 1)
    process = run_script("augment.py", *data, *TINY, "--stem", "imagenet", "--init-channels", 1, cwd=tmp_path)
    assert_one_line_error(process, "--init-channels of at least 2")
    process = run_script("augment.py", *data, *TINY, "--epochs", 1, "--stem", "imagenet", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    process = run_script("export.py", "runs/augment/folder", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "4 test images" in process.stdout
    assert "4 of the same class" in process.stdout
    about = onnxruntime.InferenceSession(tmp_path / "runs/augment/folder/best.onnx").get_modelmeta()
    assert "(N, 1, 64, 64): grey" in about.custom_metadata_map["input"]


def test_every_operation_can_be_exported_at_odd_sizes_and_any_batch(tmp_path):
    ops = [name for name in OPS if name != "none"]
    gene = [[(name, 0), (name, 1)] for name in ops]
    concat = range(2, 2 + len(ops))
    torch.manual_seed(0)
    net = (
        AugmentCNN(15, 3, 4, 5, 3, True, Genotype(gene, concat, gene, concat))
        .eval()
        .to(memory_format=torch.channels_last)
    )
    about = {"input_size": 15, "input_channels": 3, "classes": list("abcde"), "mean": [0.5, 0.4, 0.3],
             "std": [0.2, 0.3, 0.4], "genotype": "-", "preprocessing": "-"}  # fmt: skip
    write_onnx(Classifier(net, about), about, tmp_path / "all.onnx")
    classify = read_onnx(tmp_path / "all.onnx")
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    for n in (1, 2, 7):
        images = torch.rand(n, 3, 15, 15)
        with torch.no_grad():
            expected = net((images - mean) / std)[0].numpy()
        np.testing.assert_allclose(classify(images.numpy()), expected, atol=1e-5 * np.abs(expected).max())
