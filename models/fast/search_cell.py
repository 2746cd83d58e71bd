"""The fused execution of the search cell: it computes the sum that `SearchCell` defines with fewer, larger operations.

Node i of a cell is the sum over its sources j and candidates o of w_ijo * o_ij(state_j). It is computed like this:

1. Edges run together as soon as their sources are known: first all edges from both inputs, then all edges from each new
   node. The edges from one source share relu(state_j) and the pooling operations with their BN, which have no weights;
   `none` is skipped. One operation computes the weighted sums of these shared tensors for all edges.
2. A chain of (activation, depthwise convolution, pointwise convolution, BN) runs on all edges at once. On CUDA the
   pointwise convolutions of all edges are one batched matrix product, and their depthwise convolutions one grouped
   convolution. On the CPU all depthwise convolutions of a step are one call of C code.
3. The last BN of a chain, the weighting and the sum over candidates are one operation. On the CPU it is `Mixture`; it
   saves only the outputs of the depthwise convolutions for the backward pass (folded_bn.py has the mathematics). On
   other devices, where a kernel launch costs more than another pass over the data, it is PyTorch's BN with w as its
   scale.

There are two memory layouts: edge_by_edge.py for the CPU, batched.py for other devices.

Of `PartialMixedOp` edges the candidates run like this on their share of the channels, and the rest is summed beside
them. An edge of another subclass of `MixedOp`, or with a hook, runs by its own `forward`; so do the other edges to the
same node that would run together with it. A candidate operation that has none of the forms above runs by its own
`forward` on each edge. So a new operation or edge class gives right results at once, but is slower than the others.
"""

import logging

import torch

from models.fast import native
from models.fast.batched import Batched
from models.fast.edge_by_edge import EdgeByEdge
from models.fast.layout import RunningStatistics, add
from models.fast.modules import has_global_hooks, is_overridden
from models.ops import MixedOp, PartialMixedOp

BATCHED, EDGE_BY_EDGE = Batched(), EdgeByEdge()


def can_run(x):
    """Whether the fused execution supports states like x. If not, `plain_nodes` runs."""
    return layout_for(x) is not None and x.numel() > 0 and not has_global_hooks()


def layout_for(x):
    """The `Layout` for states like x: `EDGE_BY_EDGE` on the CPU, `BATCHED` elsewhere; None if native.c cannot run."""
    if x.device.type != "cpu":
        return BATCHED
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    return EDGE_BY_EDGE if native.can_read(x) and native.knows(dtype) else None


def fused_nodes(dag, s0, s1, w_dag):
    """The nodes of a search cell: a list of tensors (N, C, H, W).

    dag[i][j]: the `MixedOp` from state j to node i; s0, s1: states 0 and 1, (N, C, H, W); w_dag[i]: weights of node i's
    edges, (i + 2, candidates). In training, running statistics are recorded as the modules would record them. The
    results can be differentiated once. Raises ValueError if w_dag does not have a row for each edge.
    """
    dtype = torch.float32 if torch.is_autocast_enabled(s0.device.type) else s0.dtype
    rows = [weights.to(dtype).unbind() for weights in w_dag]  # a row may be of another type, as one-hot ones are
    if list(map(len, rows)) != list(map(len, dag)):
        raise ValueError(
            f"the cell has {list(map(len, dag))} edges by node, the weights are for {list(map(len, rows))}"
        )
    layout, states, sums, statistics = layout_for(s0), [s0, s1], [None] * len(dag), RunningStatistics()
    steps = list(_steps(dag, rows))
    prepared = iter(_prepared(layout, dag, rows, [step for step in steps if step[2]]))
    for sources, targets, standard in steps:
        outputs = {}
        if standard:
            edges = [[dag[i][j] for i in standard] for j in sources]
            weights = [[rows[i][j] for i in standard] for j in sources]
            mixed = _mixed(layout, [states[j] for j in sources], edges, weights, next(prepared), statistics)
            outputs = dict(zip(standard, mixed))
        for i in targets:
            if i not in outputs:
                outputs[i] = sum(dag[i][j](states[j], rows[i][j]) for j in sources)
            sums[i] = add(sums[i], outputs[i])
        states.append(sums[targets[0]])
    statistics.record()
    return states[2:]


def _steps(dag, rows):
    """What runs together: yields (sources, the nodes that they lead to, those whose edges are all standard)."""
    for sources in ([0, 1], *([j] for j in range(2, len(dag) + 1))):
        targets = range(sources[-1] - 1, len(dag))
        standard = [i for i in targets if all(_is_standard(dag[i][j], rows[i][j]) for j in sources)]
        first = dag[standard[0]][sources[0]] if standard else None
        yield sources, targets, [i for i in standard if all(_alike(dag[i][j], first) for j in sources)]


def _prepared(layout, dag, rows, steps):
    """The `Edges` of steps that have some."""
    if not steps:
        return []
    weights = torch.stack([rows[i][j] for sources, _, standard in steps for j in sources for i in standard], 1)
    operations = [[[dag[i][j]._ops for i in standard] for j in sources] for sources, _, standard in steps]
    return layout.prepared(operations, weights)


def _mixed(layout, states, edges, weights, prepared, statistics):
    """For each target the sum of its edges; edges[s][t] are of one kind, and of one stride for each source s."""
    firsts = [row[0] for row in edges]
    if type(firsts[0]) is MixedOp or firsts[0].K == 1:
        return layout.mixed(states, prepared, statistics)
    mixed = layout.mixed([edge.seen(x) for edge, x in zip(firsts, states)], prepared, statistics)
    passed = [edge.passed(x) for edge, x in zip(firsts, states)]
    scales = torch.stack([torch.stack(row).sum(1) for row in weights], 1).unbind()  # of each target: (sources,)
    return [
        firsts[0].joined(x, sum(scale * part for scale, part in zip(row.unbind(), passed)))
        for x, row in zip(mixed, scales)
    ]


def _alike(one, other):
    """Whether two standard edges can run together."""
    return type(one) is type(other) and getattr(one, "K", 1) == getattr(other, "K", 1)


def _is_standard(edge, weights):
    """Whether an edge is an unmodified `MixedOp` or `PartialMixedOp`, and its weights a number for each candidate."""
    is_mixed_op = type(edge) in (MixedOp, PartialMixedOp) and not is_overridden(edge)
    is_standard = is_mixed_op and weights.shape == (len(edge._ops),)
    if not is_standard and type(edge) not in _classes_in_log:
        _classes_in_log.add(type(edge))
        name = type(edge).__name__
        logging.getLogger("darts").info(f"edges that are no standard MixedOp, here {name}, run by their own forward")
    return is_standard


_classes_in_log = set()  # classes of edges that were already logged
