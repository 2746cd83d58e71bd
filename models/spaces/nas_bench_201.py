"""NAS-Bench-201 (Dong and Yang, arXiv:2001.00326): one kind of cell, and a table of what each cell is worth.

README.md beside this file says what is in the table, nas-bench-201.csv.gz.
"""

import csv
import functools
import gzip
import re
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from models.genotype import GenotypeError, shorten
from models.spaces.space import Gene, Layer, Space

TABLE = Path(__file__).with_name("nas-bench-201.csv.gz")
CANDIDATES = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]  # in the table by these indices
DATA_SETS = ("cifar10", "cifar100", "imagenet16_120")
KEYS = {"avg_pool_3x3": "avg_pool_3x3_only"}  # candidates that have another name in `OPS`


class Cell(NamedTuple):
    """A genotype. cell: its gene, in which each node has an edge from each state before it, in order."""

    cell: Gene

    def __str__(self):
        return "+".join("|" + "".join(f"{op}~{source}|" for op, source in node) for node in self.cell)


class NasBench201(Space):
    """A cell has one input and three nodes, each the sum of an operation on every state before it; the last is its
    output. Three stages of --layers cells have C, 2C and 4C channels."""

    name = "nas-bench-201"
    kinds = ("cell",)
    n_inputs = 1
    n_nodes = 3
    primitives = CANDIDATES
    is_fixed = True
    genotype_class = Cell
    defaults = {  # noqa: RUF012
        "search": {"layers": 5, "init_channels": 16, "nodes": 3, "primitives": CANDIDATES},
        "augment": {  # the training of the benchmark: arXiv:2001.00326, table 1
            "layers": 5,
            "init_channels": 16,
            "epochs": 200,
            "batch_size": 256,
            "lr": 0.1,
            "nesterov": True,
            "weight_decay": 5e-4,
            "grad_clip": 0.0,
            "aux_weight": 0.0,
            "drop_path_prob": 0.0,
            "cutout_length": 0,
        },
    }

    def genotype(self, weights, k, primitives):
        nodes = [edges.argmax(1).tolist() for edges in weights["cell"]]
        return Cell([[(primitives[best], source) for source, best in enumerate(node)] for node in nodes])

    def from_str(self, text):
        """Reads `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`, in quotes or not, or the last such `genotype = ` in a log.

        Raises GenotypeError if it is incomplete.
        """
        logged = re.findall(r"genotype = (\|\S+\|)", text)
        text = logged[-1] if logged else "".join(text.split()).strip("\"'")
        if not text.startswith("|"):
            return None
        gene = [re.findall(r"([^|~]+)~(\d+)\|", node) for node in text.split("+")]
        cell = Cell([[(op, int(source)) for op, source in node] for node in gene])
        sources = [[source for _, source in node] for node in cell.cell]
        if str(cell) != text or sources != [[0], [0, 1], [0, 1, 2]]:
            raise GenotypeError(
                f"genotype: a cell of {self.name} is |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, not {shorten(text)}"
            )
        for node in cell.cell:
            for op, _ in node:
                if op not in CANDIDATES:
                    raise GenotypeError(f"genotype: {self.name} has no {shorten(op)}, but {', '.join(CANDIDATES)}")
        return cell

    def random(self, generator, n_nodes, primitives):
        """Each edge has any of the candidates."""
        names = [name for name in CANDIDATES if name in primitives]
        return Cell([[(generator.choice(names), source) for source in range(i + 1)] for i in range(n_nodes)])

    def output_states(self, genotype, kind):
        return [len(genotype.cell)]

    def truth(self, genotype):
        table = accuracies()
        accuracy = table.get("".join(str(CANDIDATES.index(op)) for node in genotype.cell for op, _ in node))
        if accuracy is None:
            return None
        n_better = len(table) - bisect_right(in_order("cifar10"), accuracy[0])
        return dict(zip(DATA_SETS, accuracy)) | {"rank": 1 + n_better, "of": len(table)}

    def truth_marks(self):
        marks, n = {}, len(accuracies())
        for name in DATA_SETS if n else ():
            values = in_order(name)
            marks[name] = {"best": values[-1], "best hundredth": values[n - -(-n // 100)], "median": values[n // 2]}
        return marks

    def stem(self, C_in, C, stem_multiplier):
        from torch import nn

        return nn.Sequential(nn.Conv2d(C_in, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)), C

    def layers(self, C_stem, C, n_layers, new_cell):
        from models.nas_bench_201_cells import ResidualBlock

        for stage in range(3):
            if stage > 0:
                C = 2 * C
                yield Layer(None, ResidualBlock(C // 2, C), C, 2)
            for _ in range(n_layers):
                yield Layer("cell", new_cell("cell", C=C), C, 1)

    def head(self, C):
        from torch import nn

        return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def search_cell(self, kind, **options):
        from models.nas_bench_201_cells import SearchCell201

        keys = [KEYS.get(name, name) for name in options.pop("primitives")]
        return SearchCell201(primitives=keys, **options)

    def augment_cell(self, kind, **options):
        from models.nas_bench_201_cells import AugmentCell201

        gene = [[(KEYS.get(op, op), source) for op, source in node] for node in options.pop("genotype").cell]
        return AugmentCell201(gene=gene, **options)


@functools.cache
def accuracies() -> dict[str, list[float]]:
    """Operations of the edges, as digits -> test accuracies in percent; {} without the table."""
    if not TABLE.is_file():
        return {}
    with gzip.open(TABLE, "rt", newline="") as file:
        return {row[0]: list(map(float, row[1:])) for row in csv.reader(file) if row[0].isdecimal()}


@functools.cache
def in_order(data_set: str) -> list[float]:
    """The accuracies of all cells on a data set, in increasing order."""
    return sorted(row[DATA_SETS.index(data_set)] for row in accuracies().values())
