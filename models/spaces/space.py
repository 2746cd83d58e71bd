"""What a search space is. A new one is a subclass of `Space`, with an entry in `SPACES`."""

import abc
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

Gene = list[list[tuple[str, int]]]  # a list of (operation, source) for each node of a cell


def cell_name(kind: str) -> str:
    """A kind of cell in words: `normal cell`, or `cell` if there is one kind, called so."""
    return "cell" if kind == "cell" else f"{kind} cell"


class Layer(NamedTuple):
    """A part of the stack: a cell of a kind in `Space.kinds`, or another module, whose kind is None.

    C_out: its output channels; stride: 2 if its output is half as large as its input, else 1.
    """

    kind: str | None
    module: "nn.Module"
    C_out: int
    stride: int


class Space(abc.ABC):
    """A search space: the candidates, the cells, how a genotype is chosen, and the network around the cells.

    A cell has `n_inputs` inputs, the outputs of the cells before it, and some nodes. Its states are the inputs, then
    the nodes in order; node i has an edge from each state before it. For each kind of cell a network has alphas,
    `alpha_KIND`, and a genotype an attribute KIND, its gene.

    name: as given to --space
    kinds: the kinds of cell; the state of a search is judged by the first of them
    n_inputs, n_nodes: inputs of a cell, and nodes by default
    primitives: the default candidates on every edge
    defaults: "search" or "augment" -> option of that script -> default, where it differs from DARTS's space
    min_layers: the smallest --layers with cells of each kind
    is_fixed: whether there is no other number of nodes, and no other candidate than `primitives`
    chooses_edges: whether a genotype has some edges of each node, not all
    has_auxiliary_head: whether augment networks can have one, and drop path, and another stem
    genotype_class: the class of genotypes; `genotypes.from_str` reads what its `str` gives
    """

    name: str
    kinds: tuple[str, ...]
    n_inputs: int
    n_nodes: int
    primitives: list[str]
    defaults: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    min_layers = 1
    is_fixed = False
    chooses_edges = False
    has_auxiliary_head = False
    genotype_class: type

    # Genotypes

    def choosable(self, primitives: Sequence[str]) -> list[str]:
        """Those of the candidates that a genotype can have."""
        return list(primitives)

    @abc.abstractmethod
    def genotype(self, weights: dict[str, list["Tensor"]], k: int, primitives: Sequence[str]) -> Any:
        """The genotype for these weights of the candidates, from `SearchCNN.edge_weights`. k: edges of a node."""

    def check(self, genotype: Any) -> Any:
        """Return the genotype. Raises GenotypeError, which says what is wrong, if it is not valid."""
        return genotype

    @abc.abstractmethod
    def from_str(self, text: str) -> Any:
        """The genotype that a text describes; None if it does not look like one of this space."""

    @abc.abstractmethod
    def random(self, generator: random.Random, n_nodes: int, primitives: Sequence[str]) -> Any:
        """A random genotype; all are equally likely."""

    @abc.abstractmethod
    def output_states(self, genotype: Any, kind: str) -> list[int]:
        """The states that a cell's output consists of."""

    def state_name(self, state: int) -> str:
        """The name of a state of a cell in figures and logs: c_{k-1} is the previous cell's output."""
        return f"c_{{k-{self.n_inputs - state}}}" if state < self.n_inputs else f"node {state - self.n_inputs}"

    def truth(self, genotype: Any) -> dict[str, float] | None:
        """The published results of a genotype; None if there are none.

        A dict from the data set to the test accuracy in percent, with two more entries: "rank", 1 + the number of cells
        that are better on the first of the data sets, and "of", the number of all cells.
        """
        return None

    def truth_marks(self) -> dict[str, dict[str, float]]:
        """For each data set of `truth`, values to compare with, by their names; {} if nothing is known."""
        return {}

    # Networks

    @abc.abstractmethod
    def stem(self, C_in: int, C: int, stem_multiplier: int) -> tuple["nn.Module", int]:
        """The layers before the cells, and their output channels."""

    @abc.abstractmethod
    def layers(self, C_stem: int, C: int, n_layers: int, new_cell: Callable[..., "nn.Module"]) -> Iterator[Layer]:
        """The stack of cells, and what stands between them.

        C_stem: output channels of the stem; C: channels of the first cells; n_layers: --layers; new_cell: builds a
        cell, called as new_cell(kind, **channels); channels: the arguments that this space's cells need.
        """

    @abc.abstractmethod
    def head(self, C: int) -> "nn.Module":
        """The pooling of the last layer's output, of C channels, to one pixel, before the classifier."""

    @abc.abstractmethod
    def search_cell(self, kind: str, **options) -> "nn.Module":
        """A cell of the search network, called with its inputs and its weights of the candidates."""

    @abc.abstractmethod
    def augment_cell(self, kind: str, **options) -> "nn.Module":
        """A cell of the augment network, called with its inputs."""
