"""The network of the search: stacked search cells, and the architecture parameters alpha that they share."""

import contextlib
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from genotypes import Genotype, parse
from models.choices import PRIMITIVES
from models.fast import search_cell as fused_cell
from models.search_cells import SearchCell


def reduction_cells(n_layers):
    """Indices of the reduction cells: at one and two thirds of the depth (DARTS, section 3.1)."""
    return {n_layers // 3, 2 * n_layers // 3}


def check_positive(**numbers):
    """Raise ValueError naming the first that is not a whole number of at least 1."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")


class SearchCNN(nn.Module):
    """The continuous relaxation: a network that holds every candidate on every edge (DARTS, section 2.2).

    C_in: image channels; C: channels of the first cells' nodes (doubled by each of the two reduction cells); n_classes:
    logits; n_layers: cells; criterion: f(logits, y) -> loss; n_nodes: nodes of a cell; stem_multiplier: the stem has
    stem_multiplier * C channels. Images of 8x8 pixels and up, any size.

    execution: of the cells, `fused` or `plain` (see `SearchCell`), the same numbers; recompute: keep less within a
    cell for the backward pass, which then computes it again.

    `alpha_normal` and `alpha_reduce` hold node i's edges in a tensor of shape (i + 2, len(PRIMITIVES)).
    Raises ValueError where a number is below 1.
    """

    def __init__(
        self, C_in, C, n_classes, n_layers, criterion, n_nodes=4, stem_multiplier=3, execution="fused", recompute=False
    ):  # fmt: skip
        super().__init__()
        check_positive(
            C_in=C_in, C=C, n_classes=n_classes, n_layers=n_layers, n_nodes=n_nodes, stem_multiplier=stem_multiplier
        )
        self.criterion = criterion
        self.n_nodes = n_nodes
        self.recompute = recompute
        self.alpha_normal, self.alpha_reduce = (
            nn.ParameterList(nn.Parameter(1e-3 * torch.randn(i + 2, len(PRIMITIVES))) for i in range(n_nodes))
            for _ in range(2)
        )

        C_cur = stem_multiplier * C
        self.stem = nn.Sequential(nn.Conv2d(C_in, C_cur, 3, padding=1, bias=False), nn.BatchNorm2d(C_cur))
        self.cells = nn.ModuleList()
        self.reductions = [layer in reduction_cells(n_layers) for layer in range(n_layers)]
        C_pp, C_p, reduction_p = C_cur, C_cur, False
        for reduction in self.reductions:
            C = 2 * C if reduction else C
            self.cells.append(SearchCell(n_nodes, C_pp, C_p, C, reduction_p, reduction, execution))
            C_pp, C_p, reduction_p = C_p, n_nodes * C, reduction
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(C_p, n_classes)

    def forward(self, x):
        """Logits, (N, n_classes), of images (N, C_in, H, W)."""
        weights = {False: softmax(self.alpha_normal), True: softmax(self.alpha_reduce)}
        s0 = s1 = self.stem(x)
        for cell, reduction in zip(self.cells, self.reductions):
            s0, s1 = s1, self._run(cell, s0, s1, weights[reduction])
        return self.linear(self.gap(s1).flatten(1))

    def _run(self, cell, *inputs):
        if not (self.recompute and torch.is_grad_enabled()):
            return cell(*inputs)
        if cell.execution == "fused" and fused_cell.remakes(inputs[1]):
            return cell(*inputs, recompute=True)

        def contexts():
            return contextlib.nullcontext(), _unmoved_statistics(cell)

        return checkpoint(cell, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def loss(self, X, y):
        """The criterion at a batch: L_T or L_V of the paper, whichever half the batch is from."""
        return self.criterion(self(X), y)

    def alphas(self):
        """The architecture parameters: the normal cell's, then the reduction cell's."""
        yield from self.alpha_normal
        yield from self.alpha_reduce

    def weights(self):
        """The parameters w: all but the alphas."""
        alphas = set(map(id, self.alphas()))
        return (parameter for parameter in self.parameters() if id(parameter) not in alphas)

    def genotype(self):
        """The cell that the alphas stand for: the two strongest edges of each node, by softmax weight."""
        concat = range(2, 2 + self.n_nodes)
        normal, reduce = (parse(softmax(alpha), k=2) for alpha in (self.alpha_normal, self.alpha_reduce))
        return Genotype(normal, concat, reduce, concat)


def tracking(net):
    """The normalisation layers that record running statistics."""
    return [module for module in net.modules() if vars(module).get("track_running_stats")]


@contextlib.contextmanager
def frozen_statistics(modules):
    """Let normalisation layers, see `tracking`, use the batch's statistics as they do in training, and record none."""
    attributes = list(map(vars, modules))  # assigned to here, since nn.Module takes a while to see what is assigned
    try:
        for own in attributes:
            own["track_running_stats"] = False
        yield
    finally:
        for own in attributes:
            own["track_running_stats"] = True


@contextlib.contextmanager
def _unmoved_statistics(net):
    """Record running statistics with momentum 0: the same computation again, which moves none."""
    modules = tracking(net)
    before = [(module.momentum, module.num_batches_tracked.clone()) for module in modules]
    try:
        for module in modules:
            module.momentum = 0.0
        yield
    finally:
        for module, (momentum, count) in zip(modules, before):
            module.momentum = momentum
            module.num_batches_tracked.copy_(count)


def softmax(alpha):
    """The weights of each edge's candidates (DARTS, eq. 2): a tensor per node, of alpha's shape, rows summing to 1."""
    return [F.softmax(edges, dim=-1) for edges in alpha]
