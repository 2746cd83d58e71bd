"""The cell of the augment network: a genotype's operations and nothing else."""

import torch
from torch import nn

from genotypes import to_dag
from models.fast import augment_cell
from models.search_cells import cell_inputs, check_execution


class AugmentCell(nn.Module):
    """A cell built from its gene in `genotype`: the reduction gene if `reduction`, else the normal one.

    execution: `plain`, an operation at a time, which is the definition, or `fused`, the same sums from the same modules
    by `models.fast`; the other arguments are `SearchCell`'s.
    """

    def __init__(self, genotype, C_pp, C_p, C, reduction_p, reduction, execution="fused"):
        super().__init__()
        check_execution(execution)
        self.execution = execution
        gene = genotype.reduce if reduction else genotype.normal
        self.concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.preproc0, self.preproc1 = cell_inputs(C_pp, C_p, C, reduction_p, affine=True)
        self.dag = to_dag(C, gene, reduction)
        self.C_out = C * len(self.concat)

    def forward(self, s0, s1):
        """s0, s1: the two previous cells' outputs. Returns the named nodes' concatenation, (N, C_out, H, W)."""
        states = [self.preproc0(s0), self.preproc1(s1)]
        node = augment_cell.fused_node if self.execution == "fused" else plain_node
        for ops in self.dag:
            states.append(node(ops, states))
        return torch.cat([states[i] for i in self.concat], dim=1)


def plain_node(ops, states):
    """A node: the sum of its operations, each on the state that its `s_idx` names."""
    return sum(op(states[op.s_idx]) for op in ops)
