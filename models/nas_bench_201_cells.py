"""The modules of NAS-Bench-201's networks (Dong and Yang, arXiv:2001.00326, section 2.1)."""

import torch
import torch.nn.functional as F
from torch import nn

from models.ops import OPS, StdConv
from models.search_cells import check_execution, plain_nodes


class SearchCell201(nn.Module):
    """A cell of the search network: from (N, C, H, W) to the same. The arguments are those of `SearchCell`.

    Both executions compute it one operation at a time: nearly all of the time goes into its convolutions, and
    joining those that read one state, with their BN, gained nothing.
    """

    def __init__(self, n_nodes, C, primitives, execution, mixed_op):
        super().__init__()
        check_execution(execution)
        self.dag = nn.ModuleList(
            nn.ModuleList(mixed_op(C, 1, primitives) for _ in range(i + 1)) for i in range(n_nodes)
        )

    def forward(self, x: torch.Tensor, w_dag: list[torch.Tensor]) -> torch.Tensor:
        """The last node. w_dag[i]: weights of the candidates on the edges of node i, (i + 1, candidates)."""
        return plain_nodes(self.dag, [x], w_dag)[-1]


class AugmentCell201(nn.Module):
    """A cell of the augment network: from (N, C, H, W) to the same.

    gene: for each node an (operation, source) for each state before it, by their names in `OPS`.
    """

    def __init__(self, gene, C, execution):
        super().__init__()
        check_execution(execution)
        self.dag = nn.ModuleList(nn.ModuleList(OPS[op](C, 1, affine=True) for op, _ in node) for node in gene)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [x]
        for node in self.dag:
            states.append(sum(op(state) for op, state in zip(node, states, strict=True)))
        return states[-1]


class ResidualBlock(nn.Module):
    """Halves the size: two convolutions, added to a 1x1 convolution of the averages of 2x2 pixels.

    Half of an odd size is rounded up, in both branches.
    """

    def __init__(self, C_in, C_out):
        super().__init__()
        self.convs = nn.Sequential(StdConv(C_in, C_out, 3, 2, 1), StdConv(C_out, C_out, 3, 1, 1))
        self.shortcut = nn.Conv2d(C_in, C_out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(x) + self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))
