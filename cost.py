"""What cells cost: parameters, multiply-adds, activation memory, and the latency measured on this machine.

python cost.py DARTS_V2                                        # at the size that CIFAR-10 is trained with
python cost.py runs/search/cifar10 DARTS_V1 DARTS_V2           # a table over several cells
python cost.py DARTS_V2 --stem imagenet                        # at the size for ImageNet
"""

import argparse

from command_line.errors import OneLineParser, UserError, user_errors_in_one_line
from config import IMAGENET
from genotypes import PUBLISHED, resolve
from models.choices import STEMS
from models.spaces import SPACES, space_of
from run.options import natural, option_name, positive_int

DEFAULTS = {  # by stem
    "cifar": {"layers": 20, "init_channels": 36, "image_size": 32, "classes": 10},
    "imagenet": {name: IMAGENET[name] for name in ("layers", "init_channels", "image_size")} | {"classes": 1000},
}
BATCH_SIZES = (1, 64)  # for the latency
SMALLEST = {  # the smallest values that work with each stem
    "cifar": {"init_channels": 1, "image_size": 8},
    "imagenet": {"init_channels": 2, "image_size": 64},
}


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("genotypes", nargs="*", metavar="GENOTYPE", help="as for augment.py; none: all published cells")
    parser.add_argument("--stem", default="cifar", choices=STEMS, help="first layers (default: %(default)s)")
    parser.add_argument("--layers", type=positive_int, help="cells (default: 20; ImageNet stem: 14)")
    parser.add_argument(
        "--init-channels", type=positive_int, help="channels of the first cells (default: 36; ImageNet stem: 48)"
    )
    parser.add_argument("--image-size", type=positive_int, help="pixels a side (default: 32; ImageNet stem: 224)")
    parser.add_argument("--classes", type=positive_int, help="number of classes (default: 10; ImageNet stem: 1000)")
    parser.add_argument("--device", default="auto", help="where latency is measured: auto, cpu, cuda (default: auto)")
    parser.add_argument("--rounds", type=natural, default=10, help="forward passes to time; 0: none (default: 10)")
    args = parser.parse_args()
    cells = {name: resolve(name) for name in args.genotypes or PUBLISHED}
    for space in SPACES.values():
        of_space = {name: genotype for name, genotype in cells.items() if space_of(genotype) is space}
        if of_space:
            print_table(of_space, with_defaults(args, space))


def with_defaults(args, space):
    """The options, with the defaults of the stem and the search space in the place of those that were not given."""
    if args.stem != "cifar" and not space.has_auxiliary_head:
        raise UserError(f"--stem {args.stem} is not for cells of {space.name}")
    defaults = DEFAULTS[args.stem] | space.defaults.get("augment", {})
    args = argparse.Namespace(**{name: getattr(args, name) or defaults.get(name) for name in vars(args)})
    for name, smallest in SMALLEST[args.stem].items():
        if getattr(args, name) < smallest:
            raise UserError(
                f"--{option_name(name)} {getattr(args, name)}: the stem {args.stem} needs at least {smallest}"
            )
    return args


def print_table(cells: dict, args) -> None:
    """Print a table of the costs of networks of these cells. cells: name -> genotype; args: the parsed options."""
    import torch  # here, since this and the modules below take seconds to import

    from machine.devices import device_name, pick_device
    from models.augment_cnn import AugmentCNN
    from models.costs import cost, latency, median_and_range

    device, C, size = pick_device(args.device), args.init_channels, args.image_size
    print(f"{args.layers} cells, C = {C}, images of {size} x {size}, {args.classes} classes, no auxiliary head")
    if args.rounds:
        print(f"latency on {device_name(device)}, torch {torch.__version__}: median (range) of {args.rounds} passes")
    batch_sizes = BATCH_SIZES if args.rounds else ()
    name_width = max(min(max(map(len, cells)), 40), len("cell"))
    latencies = "".join(f"   {f'ms, batch {n}':>24}" for n in batch_sizes)
    print(f"{'cell':{name_width}}   parameters M   multiply-adds M   activations MB{latencies}")
    for name, genotype in cells.items():
        net = AugmentCNN(size, 3, C, args.classes, args.layers, False, genotype, stem=args.stem)
        net = net.to(device, memory_format=torch.channels_last)
        costs = cost(net, 3, size)
        row = f"{costs['parameters_M']:12.3f}   {costs['multiply_adds_M']:15.1f}   {costs['activations_MB']:14.1f}"
        for n in batch_sizes:
            times = latency(net, torch.randn(n, 3, size, size, device=device), args.rounds)
            row += f"   {median_and_range(times):>24}"
        print(f"{name[:name_width]:{name_width}}   {row}", flush=True)


if __name__ == "__main__":
    with user_errors_in_one_line("cost.py"):
        main()
