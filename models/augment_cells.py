"""The cell of the augment network: a genotype's operations and nothing else."""

import torch
from torch import nn

from genotypes import to_dag
from models.fast import chains
from models.fast.depthwise import dense_gradient
from models.search_cells import cell_inputs


class AugmentCell(nn.Module):
    """A cell built from its gene in `genotype`: the reduction gene if `reduction`, else the normal one.

    The other arguments are `SearchCell`'s.
    """

    def __init__(self, genotype, C_pp, C_p, C, reduction_p, reduction):
        super().__init__()
        gene = genotype.reduce if reduction else genotype.normal
        self.concat = list(genotype.reduce_concat if reduction else genotype.normal_concat)
        self.preproc0, self.preproc1 = cell_inputs(C_pp, C_p, C, reduction_p, affine=True)
        self.dag = to_dag(C, gene, reduction)
        self.C_out = C * len(self.concat)

    def forward(self, s0, s1):
        states = [self.preproc0(s0), self.preproc1(s1)]
        for edges in self.dag:
            states.append(dense_gradient(sum(chains.run(op, states[op.s_idx]) for op in edges)))
        return torch.cat([states[i] for i in self.concat], dim=1)
