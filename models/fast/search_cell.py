"""The fused execution of the search cell: it computes the sum that `SearchCell` defines with fewer, larger operations.

Node i of a cell is the sum over its sources j and candidates o of w_ijo * o_ij(state_j). It is computed like this:

1. Edges run together as soon as their sources are known: first all edges from both inputs, then all edges from each new
   node. Skip connections and pools with their BN have no parameters, so they have the same outputs on all edges from a
   source: these are computed once, and one operation adds them up with the weights of each edge. `none` is skipped.
2. A chain of (activation, depthwise convolution, pointwise convolution, BN) runs on all edges at once. On CUDA the
   pointwise convolutions of all edges are one batched matrix product, and their depthwise convolutions one grouped
   convolution. On the CPU all depthwise convolutions of a step are one call of C code.
3. The last BN of a chain, the weighting and the sum over candidates are one operation. On the CPU it is `Mixture`; it
   saves only the outputs of the depthwise convolutions for the backward pass (folded_bn.py has the mathematics). On
   other devices, where a kernel launch costs more than another pass over the data, it is PyTorch's BN with w as its
   scale.

There are two memory layouts: edge_by_edge.py for the CPU, batched.py for other devices.

The candidates of `PartialMixedOp` edges run like this on their share of the channels. A cell runs by the plain
execution if an edge of it is of another class or changed (see modules.py). A candidate operation that has none of the
forms above runs by its own `forward` on each edge. So a new operation or class of edges gives right results at once,
but is slower than the others.
"""

import functools
import logging

import torch
from torch import nn

from models.fast import native
from models.fast.batched import Batched
from models.fast.edge_by_edge import EdgeByEdge
from models.fast.layout import Layout, RunningStatistics, add
from models.fast.modules import is_changed
from models.ops import MixedOp, PartialMixedOp

BATCHED, EDGE_BY_EDGE = Batched(), EdgeByEdge()


def can_run(dag: nn.ModuleList, x: torch.Tensor, w_dag: list[torch.Tensor]) -> bool:
    """Whether the fused execution supports a cell with these edges, states like x, and these weights.

    All edges must be unchanged instances of one class, `MixedOp` or `PartialMixedOp`, with equally many candidates, and
    there must be a weight for each candidate.
    """
    edges = [edge for node in dag for edge in node]
    for edge in edges:
        if type(edge) not in (MixedOp, PartialMixedOp) or is_changed(edge):
            _log_class(type(edge))
            return False
    kinds = {(type(edge), getattr(edge, "K", 1), len(edge._ops)) for edge in edges}
    shapes = [(len(node), len(edges[0]._ops)) for node in dag]
    return len(kinds) == 1 and [weights.shape for weights in w_dag] == shapes and layout_for(x) is not None


@functools.cache  # says it once
def _log_class(kind):
    name = kind.__name__
    logging.getLogger("darts").info(
        f"edges of class {name} run by their own forward: only an unchanged MixedOp or PartialMixedOp is fused"
    )


def layout_for(x: torch.Tensor) -> Layout | None:
    """The layout for states like x: `EDGE_BY_EDGE` on the CPU, `BATCHED` elsewhere; None if native.c cannot run."""
    if x.device.type != "cpu":
        return BATCHED
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    return EDGE_BY_EDGE if native.can_read(x) and native.knows(dtype) else None


def fused_nodes(
    dag: nn.ModuleList, s0: torch.Tensor, s1: torch.Tensor, w_dag: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The nodes of a search cell that `can_run`: a list of tensors (N, C, H, W).

    dag[i][j]: the edge from state j to node i; s0, s1: states 0 and 1, (N, C, H, W); w_dag[i]: weights of node i's
    edges, (i + 2, candidates). In training, running statistics are recorded as the modules would record them. The
    results can be differentiated once.
    """
    dtype = torch.float32 if torch.is_autocast_enabled(s0.device.type) else s0.dtype
    rows = [weights.to(dtype).unbind() for weights in w_dag]  # one-hot weights may be integers
    # what runs together: the edges from these states to these nodes
    groups = [([0, 1], range(len(dag)))] + [([j], range(j - 1, len(dag))) for j in range(2, len(dag) + 1)]
    operations = [[[dag[i][j]._ops for i in targets] for j in sources] for sources, targets in groups]
    weights = [rows[i][j] for sources, targets in groups for j in sources for i in targets]
    layout, statistics = layout_for(s0), RunningStatistics()
    edge_groups = layout.edge_groups(operations, torch.stack(weights, 1))
    states, sums = [s0, s1], [None] * len(dag)
    for (sources, targets), group in zip(groups, edge_groups):
        images = [states[j] for j in sources]
        firsts = [dag[targets[0]][j] for j in sources]  # one edge from each source
        if getattr(firsts[0], "K", 1) == 1:
            mixed = layout.mixed(images, group, statistics)
        else:
            selected = [edge.select(x) for edge, x in zip(firsts, images)]
            mixed = layout.mixed(selected, group, statistics)
            bypassed = [edge.bypass(x) for edge, x in zip(firsts, images)]
            scales = torch.stack([torch.stack([rows[i][j] for i in targets]).sum(1) for j in sources], 1)
            for t, scale in enumerate(scales.unbind()):
                others = sum(factor * x for factor, x in zip(scale.unbind(), bypassed))
                mixed[t] = firsts[0].merge(mixed[t], others)
        for i, term in zip(targets, mixed):
            sums[i] = add(sums[i], term)
        states.append(sums[targets[0]])
    statistics.record()
    return states[2:]
