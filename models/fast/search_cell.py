"""The fused execution of the search cell: the sum that `SearchCell` defines, in fewer and larger steps.

Node i of a cell is the sum over its sources j and candidates o of w_ijo * o_ij(state_j). Here, in the paper's terms:

1. Edges whose sources are computed run together: first all edges from both inputs, then those from each new node. They
   share relu(state_j), and both pools with their normalisation, which have no weights; `none` costs nothing. What they
   share is mixed for all of them in one step.
2. A chain of (activation, depthwise, pointwise, BN) runs on all its edges at once. On CUDA the pointwise convolutions
   of all edges are one batched matrix product, the depthwise ones one grouped convolution; on the CPU all depthwise
   convolutions of a step are one operation.
3. The last BN of a chain, the weighting and the sum over candidates are one step. On the CPU it is `Mixture`, which
   keeps what the depthwise convolutions gave alone (folded_bn.py has the mathematics); elsewhere, where a launch costs
   more than another pass over the data, it is PyTorch's BN, with w as its scale.

There are two ways of laying the tensors out: edge_by_edge.py for the CPU, batched.py for other devices. An edge that is
not a plain `MixedOp`, or has a hook, runs by its own `forward`; so does a candidate that has none of these forms, on
each edge. A new operation or edge works before it is fast.
"""

import logging

import torch

from models.fast import native
from models.fast.batched import Batched
from models.fast.edge_by_edge import EdgeByEdge
from models.fast.layout import RunningStatistics, add
from models.fast.modules import has_global_hooks, is_overridden
from models.ops import MixedOp

BATCHED, EDGE_BY_EDGE = Batched(), EdgeByEdge()


def can_run(x):
    """Whether there is a fast way for states like x; where not, the cell's definition runs."""
    return layout_for(x) is not None and x.numel() > 0 and not has_global_hooks()


def layout_for(x):
    """How edges from states like x run: on the CPU edge by edge if native.c can, on other devices all at once."""
    if x.device.type != "cpu":
        return BATCHED
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    return EDGE_BY_EDGE if native.can_read(x) and native.knows(dtype) else None


def fused_nodes(dag, s0, s1, w_dag):
    """The nodes of a search cell: a list of tensors (N, C, H, W).

    dag[i][j]: the `MixedOp` from state j to node i; s0, s1: (N, C, H, W), the first two states; w_dag[i]:
    (i + 2, candidates), the weights of node i's edges. In training, running statistics are recorded as modules would.
    The results can be differentiated once. Raises ValueError where the weights' shapes are others.
    """
    dtype = torch.float32 if torch.is_autocast_enabled(s0.device.type) else s0.dtype
    rows = [weights.to(dtype).unbind() for weights in w_dag]  # a row may be of another type, as one-hot ones are
    if list(map(len, rows)) != list(map(len, dag)):
        raise ValueError(
            f"the cell has {list(map(len, dag))} edges by node, the weights are for {list(map(len, rows))}"
        )
    layout, states, sums, statistics = layout_for(s0), [s0, s1], [None] * len(dag), RunningStatistics()
    for sources in ([0, 1], *([j] for j in range(2, len(dag) + 1))):
        targets = range(sources[-1] - 1, len(dag))
        standard = [i for i in targets if all(_is_standard(dag[i][j], rows[i][j]) for j in sources)]
        outputs = {}
        if standard:
            edges = [[dag[i][j]._ops for i in standard] for j in sources]
            weights = [torch.stack([rows[i][j] for i in standard]) for j in sources]
            mixed = layout.mixed([states[j] for j in sources], edges, weights, statistics)
            outputs = dict(zip(standard, mixed))
        for i in targets:
            if i not in outputs:
                outputs[i] = sum(dag[i][j](states[j], rows[i][j]) for j in sources)
            sums[i] = add(sums[i], outputs[i])
        states.append(sums[targets[0]])
    statistics.record()
    return states[2:]


def _is_standard(edge, weights):
    """Whether an edge is a `MixedOp` as it comes, and its weights a number for each candidate."""
    is_standard = type(edge) is MixedOp and not is_overridden(edge) and weights.shape == (len(edge._ops),)
    if not is_standard and type(edge) not in _classes_in_log:
        _classes_in_log.add(type(edge))
        name = type(edge).__name__
        logging.getLogger("darts").info(f"edges that were changed, of the class {name}, run by their own forward")
    return is_standard


_classes_in_log = set()  # classes of edges that the log has named
