"""Export a trained network: one file that classifies images without this code, and without the data set.

python export.py runs/augment/cifar10                                    # ONNX: best.onnx in the run's folder
python export.py runs/augment/cifar10 --output cifar10.pt2               # as torch.export.load reads it
"""

import os
import tempfile
from pathlib import Path

from command_line.errors import OneLineParser, UserError, user_errors_in_one_line


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of augment.py, or a run's folder for its best")
    parser.add_argument(
        "--output", metavar="FILE", help="to write: .onnx, or .pt2 for torch.export's (default: CKPT's name, .onnx)"
    )
    parser.add_argument("--data-path", metavar="DIR", help="where the test images are, if no longer where they were")
    args = parser.parse_args()
    export(args.checkpoint, args.output, args.data_path)


def export(path, output, data_path):
    """Write the trained network to `output`, if the file gives the same logits as the network on test images."""
    import torch  # here, since this and the modules below take seconds to import

    from trained.evaluation import file_of, images_of, load_network, load_trained, measured_on
    from trained.exporting import FORMATS, Classifier, check, check_onnx_packages

    output = Path(output or file_of(path).with_suffix(".onnx"))
    if output.suffix not in FORMATS:
        raise UserError(f"--output must end in {' or '.join(FORMATS)}, not {output.name!r}")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    if output.suffix == ".onnx":
        check_onnx_packages()
    checkpoint = load_trained(path)
    write, read = FORMATS[output.suffix]
    results = checkpoint["results"]
    net = load_network(checkpoint, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        write(Classifier(net, results["mean"], results["std"]), results, temporary)
        print(check(read(temporary), net, images_of(checkpoint, data_path), measured_on(checkpoint)))
        os.replace(temporary, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with user_errors_in_one_line("export.py"):
        main()
