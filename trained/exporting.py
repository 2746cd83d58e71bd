"""Export trained networks as ONNX, or as .pt2 of `torch.export`: such files classify images without this code."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from command_line.errors import UserError
from images.loading import Images

N_COMPARED = 100  # the number of test images on which the logits of the file and of the network are compared
BATCH_SIZES = (1, 7)  # of these images, for the exported file
TOLERANCE = 1e-4  # of the largest logit, or of 1 if all logits are smaller
METADATA_FILE = "about.json"  # in a .pt2; ONNX has its own place for metadata


class Classifier(nn.Module):
    """A copy of a network whose input is pixels in [0, 1]: it normalises them, and has no auxiliary head.

    mean, std: per channel, of pixels in [0, 1].
    """

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # of others torch.export warns
        self.net.aux_head = None
        self.register_buffer("mean", torch.tensor([[[value]] for value in mean]))  # (C, 1, 1)
        self.register_buffer("std", torch.tensor([[[value]] for value in std]))
        self.eval()

    def forward(self, images):
        """Logits, (N, n_classes), of pixels in [0, 1], (N, C, H, W)."""
        return self.net((images - self.mean) / self.std)[0]


def metadata(results: dict) -> dict[str, str]:
    """The metadata of the exported file. results: those in the checkpoint."""
    size, channels = results["input_size"], results["input_channels"]
    colours = {1: "grey", 3: "red, green, blue"}[channels]
    return {
        "input": f"images, float32 (N, {channels}, {size}, {size}): {colours}, 0 to 1; normalisation is in the network",
        "preprocessing": results["preprocessing"],
        "output": f"logits, float32 (N, {len(results['classes'])}), in the order of classes",
        "classes": json.dumps(results["classes"]),
        "mean": json.dumps(results["mean"]),
        "std": json.dumps(results["std"]),
        "genotype": results["genotype"],
    }


def export(net: nn.Module, results: dict, path: Path) -> Callable:
    """Write a network as ONNX or .pt2, by the ending of the path, with its metadata.

    Returns the function that the written file is: from pixels in [0, 1] to logits, both NumPy arrays. Raises UserError
    if a package that ONNX needs is missing.
    """
    example = torch.zeros(2, results["input_channels"], results["input_size"], results["input_size"])
    classifier = Classifier(net, results["mean"], results["std"])
    shapes = {"images": {0: torch.export.Dim("batch")}}  # any number of images
    program = torch.export.export(classifier, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # which has the paths of source files on this machine
    if path.suffix == ".onnx":
        return _export_onnx(program, metadata(results), path)
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata(results), indent=2)})
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).detach().numpy()


def _export_onnx(program, texts, path):
    try:
        import onnx  # noqa: F401 -- torch needs it
        import onnxruntime
        import onnxscript  # noqa: F401 -- torch needs it
    except ImportError as error:
        raise UserError(
            f"ONNX needs {error.name}: pip install -r requirements-export.txt; a .pt2 file needs no more than torch"
        ) from None
    names = {"input_names": ["images"], "output_names": ["logits"]}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    exported.model.metadata_props.update(texts)
    exported.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


@torch.no_grad()
def compare(exported: Callable, net: nn.Module, images: Images) -> str:
    """Compare the logits of an exported network and of the original on images. Returns the result in words.

    exported: see `export`; net: the original, which gets the images as `images` normalises them. Raises RuntimeError if
    logits differ by more than `TOLERANCE`.
    """
    steps = [step for step in images.transform.transforms if not isinstance(step, transforms.Normalize)]
    to_pixels = transforms.Compose(steps)
    pixels = Images(images.source, images.labels, to_pixels, to_pixels, seed=0)
    samples = np.linspace(0, len(images) - 1, min(N_COMPARED, len(images))).astype(int).tolist()
    expected = np.concatenate([net(images[i][0][None])[0].numpy() for i in samples])
    logits = []  # for each of BATCH_SIZES
    for n in BATCH_SIZES:
        batches = [samples[i : i + n] for i in range(0, len(samples), n)]
        logits.append(np.concatenate([exported(np.stack([pixels[i][0].numpy() for i in batch])) for batch in batches]))
    worst = float(np.abs(np.stack(logits) - expected).max())  # NaN if any logit is
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"the exported network's logits differ by {worst:.2g}, so the file is not kept")
    n_same = int((np.stack(logits).argmax(2) == expected.argmax(1)).all(0).sum())
    at_once = " and ".join(map(str, BATCH_SIZES))
    return f"{len(samples)} images, {at_once} at once: logits within {worst:.1e}, {n_same} of the same class"
