"""The search spaces, by name. Importing this does not import torch, which takes seconds."""

from typing import Any

from models.genotype import GenotypeError, shorten
from models.spaces.darts import Darts
from models.spaces.nas_bench_201 import NasBench201
from models.spaces.space import Space

SPACES: dict[str, Space] = {space.name: space for space in (Darts(), NasBench201())}


def space_of(genotype: Any) -> Space:
    """The search space that a genotype belongs to. Raises GenotypeError if there is none."""
    for space in SPACES.values():
        if isinstance(genotype, space.genotype_class):
            return space
    raise GenotypeError(f"genotype: not one of any search space: {shorten(genotype)}")
