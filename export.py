"""Export a trained network: one file that classifies images without this code, and without the data set.

python export.py runs/augment/cifar10                                    # ONNX: best.onnx in the run's folder
python export.py runs/augment/cifar10 --output cifar10.pt2               # as torch.export.load reads it
"""

import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from running.errors import OneLineParser, UserError, user_errors_in_one_line
from running.evaluation import file_of, images_of, load_network, load_trained
from running.loading import Images

CHECKED = 100  # images on which an exported file must say what the network says
BATCHES = (1, 7)  # images at once
TOLERANCE = 1e-4  # of logits
ABOUT = "about.json"  # the file in a .pt2 that says what ONNX has as metadata


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of augment.py, or a run's folder for its best")
    parser.add_argument(
        "--output", metavar="FILE", help="to write: .onnx, or .pt2 for torch.export's (default: CKPT's name, .onnx)"
    )
    parser.add_argument("--data-path", metavar="DIR", help="where the test images are, if no longer where they were")
    args = parser.parse_args()
    checkpoint = load_trained(args.checkpoint)
    output = Path(args.output or file_of(args.checkpoint).with_suffix(".onnx"))
    if output.suffix not in FORMATS:
        raise UserError(f"--output must end in {' or '.join(FORMATS)}, not {output.name!r}")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    write, read = FORMATS[output.suffix]
    net = load_network(checkpoint, torch.device("cpu"))
    beside = output.with_name(f"{output.stem}.tmp{output.suffix}")
    try:
        write(Classifier(net, checkpoint["results"]), checkpoint["results"], beside)
        print(check(read(beside), net, images_of(checkpoint, args.data_path)))
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


class Classifier(nn.Module):
    """A copy of the network as exported: normalisation first, no auxiliary head. about: a checkpoint's results."""

    def __init__(self, net, about):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.net.aux_head = None
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor([[[value]] for value in about[name]]))  # (C, 1, 1)
        self.eval()

    def forward(self, images):
        """Logits, (N, n_classes), of pixels in [0, 1], (N, C, H, W)."""
        return self.net((images - self.mean) / self.std)[0]


def metadata(about):
    """What the exported file says of itself: strings."""
    size, channels = about["input_size"], about["input_channels"]
    colours = {1: "grey", 3: "red, green, blue"}[channels]
    return {
        "input": f"images, float32 (N, {channels}, {size}, {size}): {colours}, 0 to 1; normalisation is in the network",
        "preprocessing": about["preprocessing"],
        "output": f"logits, float32 (N, {len(about['classes'])}), in the order of classes",
        "classes": json.dumps(about["classes"]),
        "mean": json.dumps(about["mean"]),
        "std": json.dumps(about["std"]),
        "genotype": about["genotype"],
    }


def trace(classifier, about):
    """The classifier as a `torch.export` program, for any number of images."""
    size, channels = about["input_size"], about["input_channels"]
    example = torch.zeros(2, channels, size, size)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(classifier, (example,), dynamic_shapes=shapes, strict=False)


def write_pt2(classifier, about, path):
    torch.export.save(trace(classifier, about), path, extra_files={ABOUT: json.dumps(metadata(about), indent=2)})


def read_pt2(path):
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images)).numpy()


def write_onnx(classifier, about, path):
    names = {"input_names": ["images"], "output_names": ["logits"]}
    try:
        program = torch.onnx.export(trace(classifier, about), dynamo=True, verbose=False, **names)
    except torch.onnx.OnnxExporterError:  # seen with torch 2.6 and an onnxscript of years later
        raise UserError(
            f"torch {torch.__version__} cannot write this as ONNX with the onnxscript here; torch 2.14 can; --output "
            "FILE.pt2 needs no onnxscript"
        ) from None
    program.model.metadata_props.update(metadata(about))
    program.save(path, external_data=False)


def read_onnx(path):
    import onnxruntime  # which takes a second

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


FORMATS = {".onnx": (write_onnx, read_onnx), ".pt2": (write_pt2, read_pt2)}


@torch.no_grad()
def check(exported, net, images):
    """Compare an exported network with the one that it is from, on test images; returns what was found, in words.

    The one gets pixels, the other what the data set's own transforms make of them. Raises RuntimeError where logits
    differ by more than `TOLERANCE`, relative to the largest if that is above 1.
    """
    steps = images.transform.transforms
    raw = transforms.Compose([step for step in steps if not isinstance(step, transforms.Normalize)])
    pixels = Images(images.source, images.labels, raw, raw, seed=0)
    chosen = np.linspace(0, len(images) - 1, min(CHECKED, len(images))).astype(int).tolist()
    expected = torch.cat([net(images[i][0][None])[0] for i in chosen]).numpy()
    found = {}
    for n in BATCHES:
        batches = (chosen[i : i + n] for i in range(0, len(chosen), n))
        found[n] = np.concatenate([exported(np.stack([pixels[i][0].numpy() for i in batch])) for batch in batches])
    worst = float(np.max([np.abs(logits - expected) for logits in found.values()]))  # NaN if one is
    if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise RuntimeError(f"the exported network's logits differ by {worst:.2g}; it is not kept")
    same = min(int((logits.argmax(1) == expected.argmax(1)).sum()) for logits in found.values())
    batches = " and ".join(map(str, BATCHES))
    return f"{len(chosen)} test images, {batches} at once: logits within {worst:.1e}, {same} of the same class"


if __name__ == "__main__":
    with user_errors_in_one_line("export.py"):
        main()
