"""Tensors that are made again for the backward pass, instead of being kept for it.

A function that computes some of its outputs cheaply from its inputs says so by `can_be_made`. Within `remaking`, such
tensors are not saved for the backward pass but how they are made is, back to the first input that can't be.
"""

import contextlib
import threading

import torch
from torch.autograd.graph import saved_tensors_hooks

_of_thread = threading.local()  # recipes: of tensors made within `remaking`, storage -> (_Group, place, tensor)


@contextlib.contextmanager
def remaking(wanted=True):
    """What is saved for the backward pass within this is made again, where it can be."""
    if not wanted or not torch.is_grad_enabled():
        yield
        return
    before, _of_thread.recipes = _recipes(), {}
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _of_thread.recipes = before


def can_be_made(outputs, make, inputs):
    """outputs are make(*inputs), to the bit. Both are lists of tensors; what else make holds is small."""
    recipes = _recipes()
    if recipes is None:
        return
    sources = [_recipe(tensor) or _Kept(tensor) for tensor in inputs]
    group = _Group(lambda: make(*[source.get() for source in sources]))
    for place, output in enumerate(outputs):
        # holds the output, so that no other takes its place in memory
        recipes[_storage(output)] = _Recipe(group, place), output


class _Kept:
    """A tensor that is saved as it is, and must not have changed since. Not itself: an output would hold its graph."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        self.version = tensor._version

    def get(self):
        if self.tensor._version != self.version:
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        return self.tensor


class _Recipe:
    """The tensor at a place of a group."""

    def __init__(self, group, place):
        self.group, self.place = group, place

    def get(self):
        return self.group.made()[self.place]


class _Group:
    """Tensors that are made together, and held until all that saved one have had it."""

    def __init__(self, make):
        self.make, self.tensors = make, None
        self.takers = self.taken = 0

    def made(self):
        if self.tensors is not None:
            return self.tensors
        with torch.no_grad():
            tensors = self.make()
        if self.takers:
            self.tensors = tensors
        return tensors

    def take(self, place):
        tensor = self.made()[place]
        self.taken += 1
        if self.taken == self.takers:
            self.tensors, self.taken = None, 0
        return tensor


def _recipes():
    return getattr(_of_thread, "recipes", None)


def _recipe(tensor):
    recipe, made = _recipes().get(_storage(tensor), (None, None))
    same = made is not None and _looks(made) == _looks(tensor)
    return recipe if same else None


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _looks(tensor):
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def _pack(tensor):
    recipe = _recipe(tensor)
    if recipe is None:
        return _Kept(tensor)
    recipe.group.takers += 1
    return recipe


def _unpack(packed):
    return packed.get() if isinstance(packed, _Kept) else packed.group.take(packed.place)
