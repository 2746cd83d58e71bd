"""Export trained networks as ONNX, or as .pt2 of `torch.export`: such files classify images without this code."""

import copy
import importlib.util
import json

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from command_line.errors import UserError
from images.loading import Images

N_CHECKED = 100  # the number of test images on which the logits of file and network are compared
BATCH_SIZES = (1, 7)  # of these images, for the exported file
TOLERANCE = 1e-4  # on the difference of logits
METADATA_FILE = "about.json"  # in a .pt2; ONNX has its own place for metadata
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Classifier(nn.Module):
    """A copy of a network whose input is pixels in [0, 1]: it normalises them, and has no auxiliary head.

    mean, std: per channel, of pixels in [0, 1].
    """

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.net.aux_head = None
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor([[[value]] for value in values]))  # (C, 1, 1)
        self.eval()

    def forward(self, images):
        """Logits, (N, n_classes), of pixels in [0, 1], (N, C, H, W)."""
        return self.net((images - self.mean) / self.std)[0]


def metadata(results):
    """The metadata of the exported file: name -> string. results: those in the checkpoint."""
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


def trace(classifier, results):
    """The classifier as a `torch.export` program, for any number of images."""
    size, channels = results["input_size"], results["input_channels"]
    example = torch.zeros(2, channels, size, size)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(classifier, (example,), dynamic_shapes=shapes, strict=False)


def write_pt2(classifier, results, path):
    """Write the classifier for `torch.export.load`, with its metadata in `METADATA_FILE`."""
    files = {METADATA_FILE: json.dumps(metadata(results), indent=2)}
    torch.export.save(trace(classifier, results), path, extra_files=files)


def read_pt2(path):
    """Load a .pt2 file as a function from images to logits, both NumPy arrays."""
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).numpy()


def check_onnx_packages():
    """Raise UserError unless the packages that write and run ONNX are installed."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt; --output FILE.pt2 needs no more "
            "than torch"
        )


def write_onnx(classifier, results, path):
    """Write the classifier and its metadata as ONNX. To be called after `check_onnx_packages`."""
    names = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        program = torch.onnx.export(trace(classifier, results), dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError:  # seen with torch 2.6 and an onnxscript of years later
        raise UserError(
            f"torch {torch.__version__} cannot write this as ONNX with the onnxscript here; torch 2.14 can; --output "
            "FILE.pt2 needs no onnxscript"
        ) from None
    program.model.metadata_props.update(metadata(results))
    program.save(path, external_data=False)


def read_onnx(path):
    """Load an ONNX file as a function from images to logits, both NumPy arrays."""
    import onnxruntime  # here, since only export.py needs it

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


FORMATS = {".onnx": (write_onnx, read_onnx), ".pt2": (write_pt2, read_pt2)}


@torch.no_grad()
def check(exported, net, images, part="test"):
    """Compare the logits of an exported network and of the original on test images. Returns the result in words.

    exported: a function from pixels to logits, NumPy arrays; net: the original, which gets the images as `images`
    normalises them; part: what to call them. Raises RuntimeError if logits differ by more than `TOLERANCE`, times the
    largest absolute logit if that is above 1.
    """
    steps = images.transform.transforms
    raw = transforms.Compose([step for step in steps if not isinstance(step, transforms.Normalize)])
    pixels = Images(images.source, images.labels, raw, raw, seed=0)
    chosen = np.linspace(0, len(images) - 1, min(N_CHECKED, len(images))).astype(int).tolist()
    expected = torch.cat([net(images[i][0][None])[0] for i in chosen]).numpy()
    if not np.isfinite(expected).all():
        raise UserError("the outputs of the network are not finite; the exported one is not kept")
    outputs = []
    for n in BATCH_SIZES:
        batches = (chosen[i : i + n] for i in range(0, len(chosen), n))
        logits = [exported(np.stack([pixels[i][0].numpy() for i in batch])) for batch in batches]
        outputs.append(np.concatenate(logits))
    worst = float(np.max([np.abs(logits - expected) for logits in outputs]))  # NaN if any logit is
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"the exported network's logits differ by {worst:.2g}; it is not kept")
    same = min(int((logits.argmax(1) == expected.argmax(1)).sum()) for logits in outputs)
    batches = " and ".join(map(str, BATCH_SIZES))
    return f"{len(chosen)} {part} images, {batches} at once: logits within {worst:.1e}, {same} of the same class"
