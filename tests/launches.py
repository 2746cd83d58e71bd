"""Counting what a device would be asked to do."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TENSORS_AT_A_TIME = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of PyTorch's multi_tensor_apply, for so many lists
CONCATENATED_AT_A_TIME = 128


class Launches(TorchDispatchMode):
    """Counts what a GPU launches to compute or copy something: neither views of tensors nor bare allocations.

    An operation counts once, but one on lists of tensors by the lengths that CUDA takes at a time: dozens, or where the
    lists differ in strides or tensors are not dense, one.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        no_launch = ("empty", "detach", "_unsafe_view", "_record_function")
        if not is_view and not any(name in func.name() for name in no_launch):
            self.count += launches_of(func.name(), args)
        return func(*args, **(kwargs or {}))


def launches_of(name, args):
    """The launches of one operation on these arguments."""
    lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], torch.Tensor)]
    if name in ("aten::cat", "aten::stack"):
        return math.ceil(len(lists[0]) / CONCATENATED_AT_A_TIME)
    if not name.startswith(("aten::_foreach", "aten::_fused")):
        return 1
    is_fast = all(map(lie_alike, zip(*lists)))
    return math.ceil(len(lists[0]) / TENSORS_AT_A_TIME[len(lists)]) if is_fast else len(lists[0])


def lie_alike(tensors):
    """Whether tensors are dense, with the same sizes and strides."""

    def layout(tensor):
        return tensor.shape, [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]

    return all(
        torch.ops.aten.is_non_overlapping_and_dense(tensor) and layout(tensor) == layout(tensors[0])
        for tensor in tensors
    )
