"""A search space that the program does not know: two kinds of cell in turn, of two nodes each."""

import json
from typing import NamedTuple

from torch import nn

from models.nas_bench_201_cells import AugmentCell201, SearchCell201
from models.spaces.space import Layer, Space


class ToyGenotype(NamedTuple):
    even: list
    odd: list

    def __str__(self):
        return "toy " + json.dumps(self)


class Toy(Space):
    name = "toy"
    kinds = ("even", "odd")
    n_inputs = 1
    n_nodes = 2
    primitives = ("skip_connect", "nor_conv_1x1", "max_pool_3x3")
    defaults = {"search": {"nodes": 2, "layers": 2, "primitives": list(primitives)}, "augment": {"aux_weight": 0.0}}  # noqa: RUF012
    genotype_class = ToyGenotype

    def genotype(self, weights, k, primitives):
        def gene(nodes):
            best = [edges.argmax(1).tolist() for edges in nodes]
            return [[(primitives[column], source) for source, column in enumerate(node)] for node in best]

        return ToyGenotype(*(gene(weights[kind]) for kind in self.kinds))

    def from_str(self, text):
        if not text.startswith("toy "):
            return None
        genes = json.loads(text[4:])
        return ToyGenotype(*([[tuple(edge) for edge in node] for node in gene] for gene in genes))

    def random(self, generator, n_nodes, primitives):
        def gene():
            return [[(generator.choice(primitives), source) for source in range(i + 1)] for i in range(n_nodes)]

        return ToyGenotype(gene(), gene())

    def output_states(self, genotype, kind):
        return [2]

    def stem(self, C_in, C, stem_multiplier):
        return nn.Conv2d(C_in, C, 3, padding=1), C

    def layers(self, C_stem, C, n_layers, new_cell):
        for i in range(n_layers):
            kind = self.kinds[i % 2]
            yield Layer(kind, new_cell(kind, C=C), C, 1)

    def head(self, C):
        return nn.AdaptiveAvgPool2d(1)

    def search_cell(self, kind, **options):
        return SearchCell201(**options)

    def augment_cell(self, kind, genotype, **options):
        return AugmentCell201(gene=getattr(genotype, kind), **options)
