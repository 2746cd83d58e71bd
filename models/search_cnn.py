"""The search network: a stack of search cells, and the architecture parameters alpha that they share."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.choices import PRIMITIVES
from models.ops import OPS, MixedOp
from models.spaces import SPACES
from models.spaces.space import Space


def check_positive(**numbers: int) -> None:
    """Raise ValueError, with its name, for the first argument that is not a whole number of at least 1."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")


def check_primitives(primitives: Sequence[str]) -> None:
    """Raise ValueError unless all names are in `OPS`, all are different, and at least one is not none."""
    unknown = [name for name in primitives if name not in OPS]
    if unknown:
        raise ValueError(f"unknown operations {', '.join(map(str, unknown))}; there are {', '.join(OPS)}")
    if len(set(primitives)) < len(primitives) or not set(primitives) - {"none"}:
        raise ValueError(
            f"primitives must be different operations, at least one other than none, not {', '.join(primitives)}"
        )


class SearchCNN(nn.Module):
    """The continuous relaxation: a network that holds every candidate on every edge (DARTS, section 2.2).

    C_in: channels of the images, which may have any size from 8x8 pixels
    C: channels of a node in the first cells; each reduction cell doubles them
    n_classes: number of classes
    n_layers: number of cells; in NAS-Bench-201's space in each of three stages
    criterion: f(logits, y) -> loss
    n_nodes: nodes of a cell
    stem_multiplier: the stem has stem_multiplier * C channels in DARTS's space
    execution: `fused` or `plain`, which give the same numbers (see `SearchCell`)
    recompute: keep only the inputs of the cells for the backward pass, which then runs each cell forward again
        (gradient checkpointing): less memory, more time
    primitives: the candidates on every edge, keys of `OPS`
    space: the search space; shapes here and below are those of DARTS's

    `alpha_normal[i]` and `alpha_reduce[i]` are the alphas of node i's edges, of shape (i + 2, len(primitives)). In
    general there is an `alpha_KIND` for each kind of cell of the space, and node i has an edge from each input too.
    Raises ValueError if a number is below 1, or `check_primitives` rejects the primitives.

    For another relaxation, override `edge_weights`, and `draw_noise` if the weights are random; for what changes in the
    course of a search, `begin_epoch`. For another edge, set the class attribute `mixed_op`.
    """

    # the class of the edges; it must be a class: a function set here would be bound as a method
    mixed_op: type[nn.Module] = MixedOp
    alphas_learn = True  # whether the training loop takes alpha's steps in this epoch

    def __init__(
        self,
        C_in: int,
        C: int,
        n_classes: int,
        n_layers: int,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        n_nodes: int = 4,
        stem_multiplier: int = 3,
        execution: str = "fused",
        recompute: bool = False,
        primitives: Sequence[str] = PRIMITIVES,
        space: Space = SPACES["darts"],
    ):
        super().__init__()
        check_positive(
            C_in=C_in, C=C, n_classes=n_classes, n_layers=n_layers, n_nodes=n_nodes, stem_multiplier=stem_multiplier
        )
        check_primitives(primitives)
        self.criterion = criterion
        self.space = space
        self.n_nodes = n_nodes
        self.recompute = recompute
        self.primitives = tuple(primitives)
        self.noise = None  # the last result of `draw_noise`; `forward` uses it in training
        for kind in space.kinds:
            edges = (1e-3 * torch.randn(space.n_inputs + i, len(primitives)) for i in range(n_nodes))
            self.add_module(f"alpha_{kind}", nn.ParameterList(map(nn.Parameter, edges)))

        self.stem, C_stem = space.stem(C_in, C, stem_multiplier)
        options = {"n_nodes": n_nodes, "primitives": primitives, "execution": execution, "mixed_op": self.mixed_op}
        layers = list(space.layers(C_stem, C, n_layers, functools.partial(space.search_cell, **options)))
        self.cells = nn.ModuleList(layer.module for layer in layers)
        self.kinds = [layer.kind for layer in layers]
        self.gap = space.head(layers[-1].C_out)
        self.linear = nn.Linear(layers[-1].C_out, n_classes)

    @property
    def alpha(self) -> dict[str, nn.ParameterList]:
        """The alphas of each kind of cell: {"normal": alpha_normal, "reduce": alpha_reduce}."""
        return {kind: getattr(self, f"alpha_{kind}") for kind in self.space.kinds}

    def edge_weights(self, noise: Any = None) -> dict[str, list[torch.Tensor]]:
        """The weights of the candidates on every edge: the softmax of DARTS, eq. 2. Alphas become weights only here.

        noise: the result of `draw_noise`; None in evaluation, for the genotype and in logs. Returns a dict from the
        kind of cell, "normal" or "reduce", to a list with a tensor for each node, node i's of shape
        (i + 2, len(primitives)). Here each row is a softmax; an override may return any numbers.
        """
        return {kind: [F.softmax(edges, dim=-1) for edges in alpha] for kind, alpha in self.alpha.items()}

    def draw_noise(self) -> Any:
        """Draw the random numbers that `edge_weights` needs. Returns None here: DARTS needs none.

        The training loop calls this once per step and stores the result in `noise`, since all forward passes of a step
        must use the same draw: otherwise eq. 7 would divide the difference of two draws by 2 eps. An override must draw
        from torch's global generators, which are in the same state on all ranks.
        """
        return None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for an epoch, from 1 to `epochs`. The script calls it before training, and before a resumed epoch."""

    def operation_weights(self, noise: Any = None) -> dict[str, list[torch.Tensor]]:
        """As `edge_weights`, plus a column for each operation that cannot be chosen (DARTS- has one, others none)."""
        return self.edge_weights(noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, (N, n_classes), of images (N, C_in, H, W)."""
        weights = self.operation_weights(self.noise if self.training else None)
        inputs = [self.stem(x)] * self.space.n_inputs
        for cell, kind in zip(self.cells, self.kinds):
            output = self._run(cell, *inputs, weights[kind]) if kind else cell(*inputs)
            inputs = [*inputs[1:], output]
        return self.linear(self.gap(inputs[-1]).flatten(1))

    def _run(self, cell, *inputs):
        if not (self.recompute and torch.is_grad_enabled()):
            return cell(*inputs)

        def contexts():  # for the first run of the cell, and for the second in the backward pass
            return contextlib.nullcontext(), UnchangedBuffers(cell)

        return checkpoint(cell, *inputs, use_reentrant=False, context_fn=contexts)

    def loss(self, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss of a batch: the paper's L_train for a training batch, its L_val for a validation batch."""
        return self.criterion(self(X), y)

    def alphas(self) -> Iterator[nn.Parameter]:
        """The architecture parameters: the normal cell's, then the reduction cell's."""
        for alpha in self.alpha.values():
            yield from alpha

    def weights(self) -> Iterator[nn.Parameter]:
        """The network weights w: all trainable parameters except the alphas."""
        alphas = set(map(id, self.alphas()))
        return (parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in alphas)

    def genotype(self, k: int = 2) -> Any:
        """Derive the discrete cells: a `Genotype`, in which each node has the k edges with the strongest operations."""
        return self.space.genotype(self.edge_weights(), k, self.primitives)


def tracking(net: nn.Module) -> list[nn.Module]:
    """The BN layers of a network that record running statistics."""
    return [module for module in net.modules() if vars(module).get("track_running_stats")]


@contextlib.contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these BN layers (see `tracking`) use the batch's statistics, as in training, but record none."""
    dicts = [vars(module) for module in modules]  # assigned to directly, since nn.Module.__setattr__ is slow
    try:
        for attributes in dicts:
            attributes["track_running_stats"] = False
        yield
    finally:
        for attributes in dicts:
            attributes["track_running_stats"] = True


class UnchangedBuffers:
    """A context in which modules change copies of their buffers, which are dropped afterwards.

    Gradient checkpointing runs a cell a second time; this prevents that BN records the batch's statistics twice. BN
    layers with frozen statistics change nothing and are left out. A second backward pass may enter the context again.
    """

    def __init__(self, net: nn.Module):
        self.net = net

    def __enter__(self):
        modules = [module for module in self.net.modules() if vars(module).get("track_running_stats", True)]
        self.before = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
        copies = _copies([tensor for _, tensors in self.before for tensor in tensors.values() if tensor is not None])
        for buffers, tensors in self.before:
            buffers.update((name, tensor if tensor is None else next(copies)) for name, tensor in tensors.items())

    def __exit__(self, *error):
        for buffers, tensors in self.before:
            buffers.update(tensors)


@torch.no_grad()
def _copies(tensors):
    """An iterator of copies of tensors, made with one call for each dtype."""
    copies = list(map(torch.empty_like, tensors))
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        torch._foreach_copy_([copies[i] for i in same], [tensors[i] for i in same])
    return iter(copies)
