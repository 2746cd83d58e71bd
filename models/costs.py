"""What a network costs: parameters, multiply-adds, activation memory, and the latency measured on this machine."""

import copy
import statistics
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def param_size(model: nn.Module) -> float:
    """The number of parameters in millions, without the auxiliary head, as papers count them."""
    names = (name for name, _ in model.named_parameters() if not name.startswith("aux_head."))
    return sum(model.get_parameter(name).numel() for name in names) / 1e6


def cost(net: nn.Module, channels: int, size: int) -> dict[str, float]:
    """The cost of an augment network for one image: parameters_M and multiply_adds_M (millions), activations_MB.

    parameters_M: without the auxiliary head; multiply_adds_M: of convolutions and the linear layer in a forward pass
    without the auxiliary head, half of the FLOPs of PyTorch's FlopCounterMode; activations_MB: what training in float32
    saves for the backward pass, in 10^6 bytes, with the auxiliary head's part if there is one.
    """
    net = copy.deepcopy(net).to("meta")  # on the meta device only shapes are computed
    x = torch.empty(2, channels, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(x)
    return {
        "parameters_M": param_size(net),
        "multiply_adds_M": counter.get_total_flops() / len(x) / 2e6,
        "activations_MB": activation_bytes(net.train(), x) / len(x) / 1e6,
    }


def describe(costs: dict[str, float]) -> str:
    """The result of `cost` in words."""
    return (
        f"{costs['parameters_M']:.3f} M parameters, {costs['multiply_adds_M']:.1f} M multiply-adds an image, "
        f"{costs['activations_MB']:.1f} MB of activations an image in training"
    )


def activation_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward pass saves for the backward pass, without parameters and buffers; each tensor once."""
    parameters = {storage_of(tensor) for tensor in (*net.parameters(), *net.buffers())}
    saved = {}

    def save(tensor):
        if storage_of(tensor) not in parameters:
            saved[storage_of(tensor)] = tensor  # keep the tensor alive, so that its storage's address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        net(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def storage_of(tensor):
    """An identifier of the tensor's memory: equal for tensors that share memory."""
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def latency(net: nn.Module, x: torch.Tensor, rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` forward passes in eval mode, after one that is not counted."""
    x = x.to(memory_format=torch.channels_last)
    net.eval()
    milliseconds = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        net(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds[1:]


def median_and_range(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def describe_latency(net: nn.Module, channels: int, size: int, rounds: int = 5) -> str:
    """The latency of a forward pass of one image on the device that the network is on, in words."""
    x = torch.zeros(1, channels, size, size, device=next(net.parameters()).device)
    return f"{median_and_range(latency(net, x, rounds))} ms for one image, median (range) of {rounds} passes"
