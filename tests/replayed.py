"""A stand-in for CUDA graphs on the CPU: it records what a function does to tensors, and does it again.

Like a graph, it changes nothing while it records; it computes on the tensors that were there then, and leaves results
in the same places, whatever Python has done since. It fails if Python reads a number while it records. Before a replay
all tensors that were made are filled with NaN.

It knows nothing of streams, of the states of libraries, of graphs that share memory, or of what CUDA cannot record.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from machine import cuda_graphs
from models.fast import search_cell


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.made, self.replays = [], {}, 0

    def replay(self):
        self.replays += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for tensor in self.made.values():
                if tensor.is_floating_point():
                    whole(tensor).fill_(torch.nan)
            for function, args, kwargs, results in self.calls:
                for old, new in zip(tensors_of(results), tensors_of(function(*args, **kwargs))):
                    if storage(old) != storage(new):
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    """In the place of torch.cuda.graph."""

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__()
        self.graph, self.before = graph, {}  # storage -> (a tensor with it, its numbers before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tensors_of((args, kwargs)):
            if storage(tensor) not in self.graph.made and storage(tensor) not in self.before:
                self.before[storage(tensor)] = tensor, whole(tensor).clone()
        results = function(*args, **(kwargs or {}))
        for tensor in tensors_of(results):
            if storage(tensor) not in self.before:
                self.graph.made.setdefault(storage(tensor), tensor)
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, numbers in self.before.values():
                whole(tensor).copy_(numbers)
        self.before = {}


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(tensor):
    return tensor.untyped_storage()._cdata


def whole(tensor):
    """All of a tensor's memory."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor.detach(), (size,), (1,), 0)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def replayed(monkeypatch):
    """A switch: `replayed(True)` lets searches on the CPU record and replay, on CUDA's path, and returns the graphs."""
    graphs = []

    def new_graph():
        graphs.append(Graph())
        return graphs[-1]

    for name, stand_in in {
        "CUDAGraph": new_graph,
        "graph": Recorder,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph_pool_handle": object,
        "get_rng_state": torch.get_rng_state,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)
    reason_against = cuda_graphs.reason_against

    def switch(on):
        monkeypatch.setattr(
            cuda_graphs,
            "reason_against",
            lambda config, device: reason_against(config, torch.device("cuda" if on else "cpu")),
        )
        graphs.clear()
        return graphs

    return switch
