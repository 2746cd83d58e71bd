"""The search space of DARTS: a normal cell and a reduction cell, whose nodes have two edges each."""

from models.choices import PRIMITIVES
from models.genotype import Genotype, check, parse
from models.spaces.space import Layer, Space


def reduction_cells(n_layers: int) -> set[int]:
    """Indices of the reduction cells: at one and two thirds of the depth (DARTS, section 3.1)."""
    return {n_layers // 3, 2 * n_layers // 3}


class Darts(Space):
    """DARTS, sections 2.1 and 3.1. The output of a cell is the concatenation of its nodes."""

    name = "darts"
    kinds = ("normal", "reduce")
    n_inputs = 2
    n_nodes = 4
    primitives = PRIMITIVES
    min_layers = 3  # with fewer none is a normal cell
    chooses_edges = True
    has_auxiliary_head = True
    genotype_class = Genotype

    def choosable(self, primitives):
        return [name for name in primitives if name != "none"]

    def genotype(self, weights, k, primitives):
        concat = range(2, 2 + len(weights["normal"]))
        normal, reduce = (parse(weights[kind], k, primitives) for kind in self.kinds)
        return Genotype(normal, concat, reduce, concat)

    def check(self, genotype):
        return check(genotype)

    def from_str(self, text):
        return None  # genotypes.py reads the many forms of these genotypes

    def random(self, generator, n_nodes, primitives):
        """Each node has two different sources, and on the edge from each a candidate other than none."""
        # in one order, so that a seed gives the same cell however the primitives are ordered
        known = [name for name in PRIMITIVES if name in primitives]
        operations = self.choosable([*known, *sorted(set(primitives) - set(known))])
        genes = [
            [
                [(generator.choice(operations), source) for source in generator.sample(range(i + 2), 2)]
                for i in range(n_nodes)
            ]
            for _ in self.kinds
        ]
        concat = range(2, n_nodes + 2)
        return Genotype(genes[0], concat, genes[1], concat)

    def output_states(self, genotype, kind):
        return list(getattr(genotype, f"{kind}_concat"))

    def stem(self, C_in, C, stem_multiplier):
        from torch import nn

        C_stem = stem_multiplier * C
        return nn.Sequential(nn.Conv2d(C_in, C_stem, 3, padding=1, bias=False), nn.BatchNorm2d(C_stem)), C_stem

    def layers(self, C_stem, C, n_layers, new_cell, reduction_p=False):
        """reduction_p: whether input 1 of the first cell is half as large as input 0."""
        C_pp, C_p = C_stem, C_stem
        for layer in range(n_layers):
            reduction = layer in reduction_cells(n_layers)
            kind, C = ("reduce", 2 * C) if reduction else ("normal", C)
            cell = new_cell(kind, C_pp=C_pp, C_p=C_p, C=C, reduction_p=reduction_p)
            yield Layer(kind, cell, cell.C_out, 2 if reduction else 1)
            C_pp, C_p, reduction_p = C_p, cell.C_out, reduction

    def head(self, C):
        from torch import nn

        return nn.AdaptiveAvgPool2d(1)

    def search_cell(self, kind, **options):
        from models.search_cells import SearchCell

        return SearchCell(reduction=kind == "reduce", **options)

    def augment_cell(self, kind, **options):
        from models.augment_cells import AugmentCell

        return AugmentCell(reduction=kind == "reduce", **options)
