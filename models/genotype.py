"""The genotype, a discrete cell: what it is, how it is derived from alpha, checked, and built.

A gene describes one cell: it is a list of nodes, and a node is a list of (operation, source) pairs, strongest first.
Sources 0 and 1 are the outputs of the two previous cells, sources 2, 3, ... are the nodes of this cell in order. A
`Genotype` has a gene for the normal and for the reduction cell, and the list of the nodes that each concatenates.

`genotypes.py` reads and writes genotypes, and offers these names too. torch is imported only in
functions that use it, since this takes seconds.
"""

from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from models.choices import PRIMITIVES

if TYPE_CHECKING:
    import torch

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")
Gene = list[list[tuple[str, int]]]


class GenotypeError(ValueError):
    """A genotype that cannot be read or built; the message says where and what is allowed."""


def parse(alpha: Iterable["torch.Tensor"], k: int, primitives: Sequence[str] = PRIMITIVES) -> Gene:
    """Derive a gene from the strengths of the operations on the edges (DARTS, section 2.4).

    On each edge the best candidate is the strongest one other than none. Each node has the k edges whose best
    candidates are strongest (all, if it has fewer), strongest first; ties go to the smaller index.

    alpha: a tensor for each node, node i's of shape (i + 2, len(primitives)). `SearchCNN.genotype` passes
        `edge_weights` (softmax weights), since raw alphas are not comparable across edges.
    primitives: the operation of each column
    """
    candidates = [column for column, primitive in enumerate(primitives) if primitive != "none"]
    gene = []
    for edges in alpha:
        strengths = edges.tolist()
        best = [max(candidates, key=row.__getitem__) for row in strengths]
        sources = sorted(range(len(best)), key=lambda source: -strengths[source][best[source]])
        gene.append([(primitives[best[source]], source) for source in sources[:k]])
    return gene


def to_dag(C_in: int, gene: Gene, reduction: bool) -> "torch.nn.ModuleList":
    """Build the operations of a cell: a ModuleList of nodes, each a ModuleList of operations.

    Each operation has C_in input and output channels, and its source as attribute `s_idx`. In a reduction cell the
    operations on the two inputs have stride 2. Every operation except the identity is followed by drop path (DARTS,
    appendix A.2.1).
    """
    from torch import nn

    from models.ops import OPS, DropPath_, Identity

    dag = nn.ModuleList()
    for edges in gene:
        node = nn.ModuleList()
        for name, source in edges:
            op = OPS[name](C_in, 2 if reduction and source < 2 else 1, True)
            if not isinstance(op, Identity):
                op = nn.Sequential(op, DropPath_())
            op.s_idx = source
            node.append(op)
        dag.append(node)
    return dag


def check(genotype: Genotype) -> Genotype:
    """Return the genotype if it is valid; else raise GenotypeError, which says what is wrong and what is allowed."""
    for kind in ("normal", "reduce"):
        gene, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if not isinstance(gene, (list, tuple)) or not gene:
            raise GenotypeError(f"genotype: {kind} must be a list of nodes, not {shorten(gene)}")
        for i, node in enumerate(gene):
            where = f"{kind}, node {i}"
            if not isinstance(node, (list, tuple)) or not node or isinstance(node[0], str):
                raise GenotypeError(
                    f"genotype: {where} must be a list of (operation, source) pairs, not {shorten(node)}"
                )
            for pair in node:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise GenotypeError(f"genotype: {where}: expected (operation, source), found {shorten(pair)}")
                name, source = pair
                _check_operation(name, where)
                if type(source) is not int or not 0 <= source < i + 2:
                    raise GenotypeError(
                        f"genotype: {where}: the source of {name} must be 0 to {i + 1}, not {shorten(source)}"
                    )
        nodes = range(2, len(gene) + 2)
        if not isinstance(concat, (list, tuple, range)) or not 0 < len(concat) <= len(nodes):
            raise GenotypeError(f"genotype: {kind}_concat must name 1 to {len(nodes)} nodes, not {shorten(concat)}")
        if len(set(map(repr, concat))) < len(concat) or any(type(n) is not int or n not in nodes for n in concat):
            raise GenotypeError(
                f"genotype: {kind}_concat must name nodes 2 to {nodes[-1]}, each once, not {shorten(concat)}"
            )
    return genotype


def _check_operation(name, where):
    """Raise GenotypeError unless there is an operation of this name."""
    if isinstance(name, str) and name in PRIMITIVES:
        return
    from models.ops import OPS  # imports torch, so only if the name is not in DARTS's search space

    if not isinstance(name, str) or name not in OPS:
        raise GenotypeError(f"genotype: {where}: unknown operation {shorten(name)}; allowed are {', '.join(OPS)}")


def shorten(value, limit=80):
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
