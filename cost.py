"""What cells cost: parameters, multiply-adds, activation memory, and the latency measured on this machine.

python cost.py DARTS_V2                                        # at the size that CIFAR-10 is trained with
python cost.py runs/search/cifar10 DARTS_V1 DARTS_V2           # a table over several cells
python cost.py DARTS_V2 --stem imagenet                        # at the size for ImageNet
"""

import copy
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import IMAGENET, natural, positive_int
from genotypes import PUBLISHED, resolve
from models.augment_cnn import AugmentCNN
from models.choices import STEMS
from running.errors import OneLineParser, UserError, user_errors_in_one_line
from running.run import device_name, pick_device
from utils import param_size

CIFAR10 = {"layers": 20, "init_channels": 36, "image_size": 32}
BATCHES = (1, 64)


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("genotypes", nargs="*", metavar="GENOTYPE", help="as for augment.py; none: all published cells")
    parser.add_argument("--stem", default="cifar", choices=STEMS, help="(default: %(default)s)")
    parser.add_argument("--layers", type=positive_int, help="cells (default: 20, with the ImageNet stem 14)")
    parser.add_argument("--init-channels", type=positive_int, help="of the first cells (default: 36, 48)")
    parser.add_argument("--image-size", type=positive_int, help="pixels a side (default: 32, 224)")
    parser.add_argument("--classes", type=positive_int, help="(default: 10, 1000)")
    parser.add_argument("--device", default="auto", help="for the latency: auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--rounds", type=natural, default=10, help="forward passes timed; 0: none (default: 10)")
    args = parser.parse_args()
    imagenet = args.stem == "imagenet"
    usual = IMAGENET if imagenet else CIFAR10
    layers, C, size = (getattr(args, name) or usual[name] for name in ("layers", "init_channels", "image_size"))
    classes, device = args.classes or (1000 if imagenet else 10), pick_device(args.device)
    if size < (64 if imagenet else 8):
        raise UserError(f"--image-size {size}: the stem {args.stem} needs at least {64 if imagenet else 8} pixels")
    cells = {name: resolve(name) for name in args.genotypes or PUBLISHED}
    about = f"{layers} cells, C = {C}, images of {size} x {size}, {classes} classes, without the auxiliary head"
    timing = f"; latency of a forward pass on {device_name(device)}, torch {torch.__version__}: median (range) of "
    print(about + (f"{timing}{args.rounds}" if args.rounds else ""))
    wide = max(min(max(map(len, cells)), 40), len("cell"))
    latencies = "".join(f"   {f'ms, batch {n}':>24}" for n in BATCHES if args.rounds)
    print(f"{'cell':{wide}}   parameters M   multiply-adds M   activations MB{latencies}")
    for name, genotype in cells.items():
        net = AugmentCNN(size, 3, C, classes, layers, False, genotype, stem=args.stem)
        net = net.to(device, memory_format=torch.channels_last).eval()
        found = cost(net, 3, size)
        row = f"{found['parameters_M']:12.3f}   {found['multiply_adds_M']:15.1f}   {found['activations_MB']:14.1f}"
        for n in BATCHES[: 2 if args.rounds else 0]:
            row += f"   {show(latency(net, torch.randn(n, 3, size, size, device=device), args.rounds)):>24}"
        print(f"{name[:wide]:{wide}}   {row}", flush=True)


def cost(net, channels, size):
    """What an augment network costs, for one image: a dict of millions, and of MB (10^6 bytes) in float32.

    parameters_M: without the auxiliary head; multiply_adds_M: of convolutions and the linear layer in a forward pass
    without the head, half of what PyTorch's FlopCounterMode counts; activations_MB: what training keeps for the
    backward pass, module by module, the head's too if there is one, each tensor once.
    """
    net = copy.deepcopy(net).to("meta")  # where nothing is computed but shapes
    x = torch.empty(2, channels, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(x)
    return {
        "parameters_M": param_size(net),
        "multiply_adds_M": counter.get_total_flops() / len(x) / 2e6,
        "activations_MB": kept_bytes(net.train(), x) / len(x) / 1e6,
    }


def describe(found):
    """What `cost` found, in words."""
    return (
        f"{found['parameters_M']:.3f} M parameters, {found['multiply_adds_M']:.1f} M multiply-adds an image, "
        f"{found['activations_MB']:.1f} MB of activations an image in training"
    )


def describe_latency(net, channels, size, rounds=5):
    """The latency of a forward pass on the device that the network is on, in words."""
    device, generator = next(net.parameters()).device, torch.Generator().manual_seed(0)
    found = []
    for n in BATCHES:
        x = torch.randn(n, channels, size, size, generator=generator)
        try:
            found.append(f"{show(latency(net, x.to(device), rounds))} ms at batch {n}")
        except (MemoryError, RuntimeError):  # PyTorch's out of memory is one of these; a run need not end by it
            found.append(f"too much memory at batch {n}")
    return f"{' and '.join(found)}, median (range) of {rounds} passes on {device_name(device)}"


def kept_bytes(net, x):
    """Bytes that a forward pass in training keeps for the backward pass, parameters left out."""
    own = {storage_of(tensor) for tensor in (*net.parameters(), *net.buffers())}
    kept = {}

    def keep(tensor):
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor  # held on to, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def latency(net, x, rounds):
    """Milliseconds of `rounds` forward passes, after one that is not counted."""
    x = x.to(memory_format=torch.channels_last)
    net.eval()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        net(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        seconds.append(1e3 * (time.perf_counter() - start))
    return seconds[1:]


def show(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    with user_errors_in_one_line("cost.py"):
        main()
