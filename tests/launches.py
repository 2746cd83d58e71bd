"""Counting what a device would be asked to do."""

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy something: neither views of tensors nor bare allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not is_view and not any(name in func.name() for name in ("empty", "detach", "_unsafe_view"))
        return func(*args, **(kwargs or {}))
