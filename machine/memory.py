"""Refuses options that need more memory than the machine has, before anything is built.

This module does not import torch.
"""

import os
from pathlib import Path

from command_line.errors import UserError

OBJECTS = 10e3  # bytes that the modules of an operation take at least, beside their weights
WORKER = 10e6  # bytes that a process that loads images takes at least
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container: bytes, or `max`


def check_memory(config, n_ops, size=0, images=0):
    """Raise UserError if a run with these options certainly needs more memory than this machine has.

    The need is estimated from below by formulas, so no network is built. config: has `layers`, `init_channels` and
    maybe `workers`; n_ops: operations in a cell; size: pixels a side of what the first cell gets; images: how many are
    in a batch whose activations are kept in the machine's memory.
    """
    C, n_ops = config.init_channels, config.layers * n_ops
    # the second and the last third of the cells have 2 and 4 times the channels; three in four operations C^2 weights
    weights = 4 * 0.75 * (1 + 4 + 16) / 3 * C**2
    needs = {
        "--layers, --init-channels" + " or --nodes" * hasattr(config, "nodes"): n_ops * (OBJECTS + weights),
        "--batch-size": images * n_ops * C * size**2 / 2,
        "--workers": getattr(config, "workers", 0) * WORKER,
    }
    largest, needed, there = max(needs, key=needs.get), sum(needs.values()), machine_memory()
    if needed > there:
        raise UserError(
            f"this needs at least {needed / 1e9:.3g} GB, and the machine has {there / 1e9:.3g}: lower {largest}"
        )


def machine_memory():
    """Bytes of memory that this machine, or the container, has; infinite where the system does not say."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else "max"
    return min(memory, int(limit)) if limit.isdecimal() else memory
