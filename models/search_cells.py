"""The cell of the search: every edge a mixture of all candidates."""

import torch
from torch import nn

from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import FactorizedReduce, MixedOp, StdConv


def check_execution(execution):
    """Raise ValueError unless there is an execution of this name."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, not {execution!r}")


def cell_inputs(C_pp, C_p, C, reduction_p, affine):
    """preproc0 and preproc1: bring the outputs of the two previous cells to C channels and one size.

    After a reduction cell (`reduction_p`) the older of the two is twice as large, and is halved.
    """
    preproc0 = FactorizedReduce(C_pp, C, affine) if reduction_p else StdConv(C_pp, C, 1, 1, 0, affine)
    return preproc0, StdConv(C_p, C, 1, 1, 0, affine)


class SearchCell(nn.Module):
    """A cell of n_nodes nodes, each the sum of its mixed edges from both inputs and all earlier nodes (DARTS, eq. 1).

    C_pp, C_p: channels of the outputs of the cell before the previous one and of the previous one; C: channels of each
    node; reduction_p: the previous cell halved the size; reduction: this one does, its edges from the inputs having
    stride 2; primitives: the candidates on each edge; mixed_op: the class of an edge, called as `MixedOp`; execution:
    `plain`, an operation at a time, which is the definition, or `fused`, the same sum from the same modules by
    `models.fast`. Raises ValueError for any other.
    """

    def __init__(
        self,
        n_nodes,
        C_pp,
        C_p,
        C,
        reduction_p,
        reduction,
        primitives=PRIMITIVES,
        execution="fused",
        mixed_op=MixedOp,
    ):
        super().__init__()
        check_execution(execution)
        self.execution = execution
        self.preproc0, self.preproc1 = cell_inputs(C_pp, C_p, C, reduction_p, affine=False)
        self.dag = nn.ModuleList(
            nn.ModuleList(mixed_op(C, 2 if reduction and source < 2 else 1, primitives) for source in range(i + 2))
            for i in range(n_nodes)
        )

    def forward(self, s0, s1, w_dag):
        """s0, s1: the two previous cells' outputs; w_dag: per node i, the weights of its edges, (i + 2, candidates).

        Returns the nodes' concatenation, (N, n_nodes * C, H, W).
        """
        s0, s1 = self.preproc0(s0), self.preproc1(s1)
        if self.execution == "fused" and search_cell.can_run(s0):
            nodes = search_cell.fused_nodes(self.dag, s0, s1, w_dag)
        else:
            nodes = plain_nodes(self.dag, s0, s1, w_dag)
        return torch.cat(nodes, dim=1)


def plain_nodes(dag, s0, s1, w_dag):
    """The nodes of a search cell, an operation at a time: a list of tensors (N, C, H, W)."""
    states = [s0, s1]
    for edges, weights in zip(dag, w_dag, strict=True):
        states.append(sum(edge(s, w) for edge, s, w in zip(edges, states, weights, strict=True)))
    return states[2:]
