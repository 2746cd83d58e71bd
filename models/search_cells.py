"""The search cell: every edge is a weighted sum of all candidate operations."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import FactorizedReduce, MixedOp, StdConv


def check_execution(execution: str) -> None:
    """Raise ValueError unless there is an execution of this name."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, not {execution!r}")


def cell_inputs(C_pp: int, C_p: int, C: int, reduction_p: bool, affine: bool) -> tuple[nn.Module, nn.Module]:
    """(preproc0, preproc1): modules that bring the outputs of the two previous cells to C channels and the same size.

    If the previous cell is a reduction cell (`reduction_p`), the output of the cell before it is twice as large, and
    preproc0 halves it.
    """
    preproc0 = FactorizedReduce(C_pp, C, affine) if reduction_p else StdConv(C_pp, C, 1, 1, 0, affine)
    return preproc0, StdConv(C_p, C, 1, 1, 0, affine)


class SearchCell(nn.Module):
    """A cell of n_nodes nodes. Each node is the sum of its edges from both inputs and all earlier nodes (DARTS, eq. 1).

    C_pp, C_p: output channels of the cell before the previous one, and of the previous one
    C: channels of each node
    reduction_p: whether the previous cell is a reduction cell
    reduction: whether this is a reduction cell, whose edges from the inputs have stride 2
    primitives: the candidates on each edge
    execution: `plain` runs one operation at a time and is the definition; `fused` computes the same sum with the same
        modules in fewer operations (models/fast). Raises ValueError for any other execution.
    mixed_op: the class of the edges, called as mixed_op(C, stride, primitives)
    """

    def __init__(
        self,
        n_nodes: int,
        C_pp: int,
        C_p: int,
        C: int,
        reduction_p: bool,
        reduction: bool,
        primitives: Sequence[str] = PRIMITIVES,
        execution: str = "fused",
        mixed_op: Callable[..., nn.Module] = MixedOp,
    ):
        super().__init__()
        check_execution(execution)
        self.execution = execution
        self.C_out = n_nodes * C
        self.preproc0, self.preproc1 = cell_inputs(C_pp, C_p, C, reduction_p, affine=False)
        self.dag = nn.ModuleList(
            nn.ModuleList(mixed_op(C, 2 if reduction and source < 2 else 1, primitives) for source in range(i + 2))
            for i in range(n_nodes)
        )

    def forward(self, s0: torch.Tensor, s1: torch.Tensor, w_dag: list[torch.Tensor]) -> torch.Tensor:
        """The concatenation of the nodes, (N, n_nodes * C, H, W).

        s0, s1: outputs of the cell before the previous one, and of the previous one; w_dag[i]: weights of the
        candidates on the edges of node i, (i + 2, candidates).
        """
        s0, s1 = self.preproc0(s0), self.preproc1(s1)
        if self.execution == "fused" and search_cell.can_run(self.dag, s0, w_dag):
            nodes = search_cell.fused_nodes(self.dag, s0, s1, w_dag)
        else:
            nodes = plain_nodes(self.dag, [s0, s1], w_dag)
        return torch.cat(nodes, dim=1)


def plain_nodes(dag: nn.ModuleList, inputs: list[torch.Tensor], w_dag: list[torch.Tensor]) -> list[torch.Tensor]:
    """The nodes of a search cell, computed one operation at a time: a list of tensors (N, C, H, W).

    dag[i][j]: the edge from state j to node i; the states are the inputs, then the nodes; w_dag[i]: weights of the
    candidates on the edges of node i, (edges, candidates).
    """
    states = list(inputs)
    for edges, weights in zip(dag, w_dag, strict=True):
        states.append(sum(edge(s, w) for edge, s, w in zip(edges, states, weights, strict=True)))
    return states[len(inputs) :]
