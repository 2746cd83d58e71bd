"""Export a trained network: one file that classifies images without this code, and without the data set.

python export.py runs/augment/cifar10                                    # ONNX: checkpoint.onnx in the run's folder
python export.py runs/augment/cifar10 --output cifar10.pt2               # for torch.export.load
"""

import os
import tempfile
from pathlib import Path

from command_line.errors import OneLineParser, UserError, user_errors_in_one_line


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint of augment.py, or a run's folder for the last")
    parser.add_argument(
        "--output",
        type=os.path.expanduser,
        metavar="FILE",
        help="the file to write: .onnx, or .pt2 for torch.export (default: CKPT's path with .onnx)",
    )
    parser.add_argument(
        "--data-path", type=os.path.expanduser, metavar="DIR", help="folder of the test images, if they have moved"
    )
    args = parser.parse_args()

    import torch  # here, since this and the modules below take seconds to import

    from trained.evaluation import file_of, images_of, load_network, load_trained
    from trained.exporting import compare, export

    output = Path(args.output or file_of(args.checkpoint).with_suffix(".onnx"))
    if output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--output must end in .onnx or .pt2, not {output.name!r}")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")
    trained = load_trained(args.checkpoint)
    net = load_network(trained, torch.device("cpu"))
    images, images_name = images_of(trained, args.data_path)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        temporary_path = Path(folder) / output.name
        exported = export(net, trained.results, temporary_path)
        print(f"checked on {images_name} images: {compare(exported, net, images)}")
        os.replace(temporary_path, output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{trained.choice}")


if __name__ == "__main__":
    with user_errors_in_one_line("export.py"):
        main()
