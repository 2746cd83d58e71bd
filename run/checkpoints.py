"""Checkpoints: written atomically, read without executing code, and loaded into networks and optimizers."""

import io
from pathlib import Path

import torch

from command_line.errors import UserError
from run.folder import RunFolder, reading, write_atomically


def save_checkpoint(state: dict, folder: str | Path, is_best: bool = False):
    """Save a state of tensors and built-in types as checkpoint.pt in the folder, and also as best.pt if `is_best`.

    Each file is written atomically. Raises OSError if one cannot be written; the old files stay as they are.
    """
    files, buffer = RunFolder(folder), io.BytesIO()
    torch.save(state, buffer)
    # best.pt first: if the run is killed in between, it goes on from the older checkpoint.pt and does this again
    for path in [files.best] * is_best + [files.checkpoint]:
        write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """Read a file of `save_checkpoint`, with tensors on the CPU. Nothing in the file is executed.

    Raises UserError if the file is damaged or holds more than tensors and built-in types, OSError if it is not there.
    """
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_network(net: torch.nn.Module, saved: dict, source: str | Path):
    """Load a saved `state_dict`. Raises UserError if it belongs to another network, see `check_network`."""
    check_network(net, saved, source)
    net.load_state_dict(saved)


def check_network(net: torch.nn.Module, saved: dict, source: str | Path):
    """Raise UserError, which names the first tensor that differs, unless a saved `state_dict` is of this network.

    source: the file, for error messages.
    """
    expected = net.state_dict()
    for name in (*expected, *saved):
        if name not in saved or name not in expected:
            which = "unknown to this network" if name in saved else "missing"
            raise UserError(f"{source} is of another network: {name} is {which}")
        check_tensor(saved[name], expected[name], f"{source}: {name}")


def load_optimizer(optim: torch.optim.Optimizer, saved: dict, source: str | Path):
    """Load the saved buffers of an optimizer; its settings stay those of the run's options.

    Buffers are laid out in memory as the parameters are, which the optimizers' fused steps rely on. Raises UserError if
    a buffer is not of the shape and type of its parameter.
    """
    parameters = [parameter for group in optim.param_groups for parameter in group["params"]]
    state = {}
    for index, buffers in saved["state"].items():
        state[index] = {}
        for name, value in buffers.items():
            if isinstance(value, torch.Tensor) and (value.dim() > 0 or name != "step"):  # Adam counts steps in a scalar
                check_tensor(value, parameters[index], f"{source}: {name} of parameter {index}")
                value = torch.empty_like(parameters[index], device="cpu").copy_(value)  # noqa: PLW2901
            state[index][name] = value
    groups = optim.state_dict()["param_groups"]
    for group, saved_group in zip(groups, saved["param_groups"]):
        if "initial_lr" in saved_group:  # it has a learning-rate schedule, which starts from this
            group["initial_lr"] = group["lr"]
    optim.load_state_dict({"state": state, "param_groups": groups})


def check_tensor(value, expected: torch.Tensor, name: str):
    """Raise UserError unless a value is a tensor of the expected shape and type."""
    if not isinstance(value, torch.Tensor) or value.shape != expected.shape or value.dtype != expected.dtype:
        kind = (
            f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        )
        raise UserError(f"{name} is {kind}, not {expected.dtype} of shape {list(expected.shape)}")
