"""The cell of the augment network: the operations that the genotype names."""

import torch
from torch import nn

from models.fast import augment_cell
from models.genotype import Genotype, to_dag
from models.search_cells import cell_inputs, check_execution


class AugmentCell(nn.Module):
    """A cell built from the genotype's `reduce` gene if `reduction`, else from its `normal` gene.

    The other arguments are those of `SearchCell`.
    """

    def __init__(
        self,
        genotype: Genotype,
        C_pp: int,
        C_p: int,
        C: int,
        reduction_p: bool,
        reduction: bool,
        execution: str = "fused",
    ):
        super().__init__()
        check_execution(execution)
        self.execution = execution
        gene = genotype.reduce if reduction else genotype.normal
        self.concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.preproc0, self.preproc1 = cell_inputs(C_pp, C_p, C, reduction_p, affine=True)
        self.dag = to_dag(C, gene, reduction)
        self.C_out = C * len(self.concat)

    def forward(self, s0: torch.Tensor, s1: torch.Tensor) -> torch.Tensor:
        """The concatenation of the nodes in `concat`, (N, C_out, H, W). s0, s1: as in `SearchCell`."""
        states = [self.preproc0(s0), self.preproc1(s1)]
        node = augment_cell.fused_node if self.execution == "fused" else plain_node
        for ops in self.dag:
            states.append(node(ops, states))
        return torch.cat([states[i] for i in self.concat], dim=1)


def plain_node(ops: nn.ModuleList, states: list[torch.Tensor]) -> torch.Tensor:
    """A node: the sum of its operations, each applied to the state of index `s_idx`."""
    return sum(op(states[op.s_idx]) for op in ops)
