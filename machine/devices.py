"""The device of a run, and the states of all random generators."""

import os
import platform
import random

import numpy as np
import torch

from command_line.errors import ThisRankError, UserError
from machine import ranks

ELEMENTS_PER_THREAD = 65536


def pick_device(name):
    """The torch.device for --device. `auto` is CUDA if available, else the CPU. Each of several ranks has its own GPU.

    Raises UserError if this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    n_gpus = torch.cuda.device_count()
    if ranks.size() > 1 and name.startswith("cuda"):
        n_local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        if name != "cuda" or n_local_ranks > n_gpus:
            error = ThisRankError if ranks.local_rank() == 0 else UserError  # one message for each machine
            raise error(
                f"--device {name}: each of the {n_local_ranks} ranks here takes a GPU of its own, and there are "
                f"{n_gpus}; give cuda or cpu, and no more ranks than GPUs"
            )
        return torch.device("cuda", ranks.local_rank())
    names = ["cpu", *(f"cuda:{i}" for i in range(n_gpus))]
    names += ["cuda"] * (n_gpus > 0) + ["mps"] * torch.backends.mps.is_available()
    if name not in names:
        raise UserError(f"--device {name}: not on this machine; there are auto, {', '.join(names)}")
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else PyTorch keeps a context, and memory, on the first one too
    return device


def limit_threads(n_images, size, channels):
    """Use at most one thread for every `ELEMENTS_PER_THREAD` in the largest feature maps of a batch.

    More gain nothing there, and beside other programs they wait for each other. What OMP_NUM_THREADS sets stays.
    size: pixels a side; channels: of the first cells.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        n_threads = n_images * size**2 * channels // ELEMENTS_PER_THREAD
        torch.set_num_threads(max(1, min(n_threads, torch.get_num_threads())))


def use_deterministic_algorithms():
    """Let all that follows on a GPU give the same bits each time. To be called before the GPU is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging, and takes time
    torch.use_deterministic_algorithms(True, warn_only=True)


def device_name(device):
    """The name of the GPU, or of the CPU with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def seed_generators(seed):
    """Seed all global random generators: torch's, NumPy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device):
    """The states of all global random generators: torch's (CPU and device), NumPy's and Python's, for a checkpoint.

    All ranks have the same states, since they draw the same numbers.
    """
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "python": random.getstate(),
    }


def set_random_state(state, device):
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])
