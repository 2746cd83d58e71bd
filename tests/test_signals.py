"""What tells how good a cell is, on made-up searches whose published accuracies are known."""

import math

import pytest
from scipy.stats import rankdata

from evidence.signals import RULES, accuracy, correlations
from genotypes import random_genotypes
from models.spaces import SPACES
from report.comparison import Method
from report.published import by_epoch, tables

NB201 = SPACES["nas-bench-201"]
CELLS = sorted(random_genotypes(12, 1, NB201), key=lambda cell: NB201.truth(cell)["cifar10"])


def history(order, top1=None, eigenvalues=None):
    """A history with these of `CELLS`, by epoch."""
    return [
        {
            "epoch": epoch,
            "string": str(CELLS[i]),
            "valid_top1": top1[epoch - 1] if top1 else i / 100,
            "eigenvalue": eigenvalues[epoch - 1] if eigenvalues else 1.0,
            "margins": {"cell": [0.1] * 6},
            "alphas_learn": True,
        }
        for epoch, i in enumerate(order, 1)
    ]


def test_rank_correlations_are_spearmans_of_each_search_and_their_mean():
    rising, falling = history(range(12)), history(range(11, -1, -1), top1=[e / 100 for e in range(12)])
    found = correlations([rising, falling])
    assert found["validation accuracy"].value == pytest.approx(0)
    assert correlations([rising])["late epoch"].value == pytest.approx(1)
    assert found["small eigenvalue"] is found["large margins"] is None  # they never change
    order = [3, 1, 4, 10, 5, 9, 2, 6, 0, 11, 8, 7]
    some = history(order, top1=[math.sin(e) for e in range(12)])
    x, y = rankdata([e["valid_top1"] for e in some]), rankdata([accuracy(e) for e in some])
    expected = 1 - 6 * sum((x - y) ** 2) / (12 * (144 - 1))
    assert correlations([some])["validation accuracy"].value == pytest.approx(expected)


def test_each_rule_chooses_its_epoch():
    some = history([5, 5, 5, 11, 0, 1, *[2] * 12], eigenvalues=[1.0] * 15 + [2.0] * 3)
    chosen = {rule: choose(some)["epoch"] for rule, choose in RULES.items()}
    assert chosen["last epoch"] == 18
    assert chosen["highest validation accuracy"] == chosen["best epoch, by the published accuracy"] == 4
    assert chosen["early stopping (DARTS-ES)"] == 10
    assert chosen["first epoch that is settled"] == 3
    n_skips = [str(CELLS[i]).count("skip") for i in [5, 5, 5, 11, 0, 1, *[2] * 12]]
    last_of_fewest = 18 - n_skips[::-1].index(min(n_skips))
    assert chosen["fewest skip connections, the last of equals"] == last_of_fewest


def test_tables_and_figure_have_every_method_with_searches():
    found = [{"truth": NB201.truth(cell), "search": {"history": history(range(i + 1))}} for i, cell in enumerate(CELLS)]
    drawn = [{"truth": NB201.truth(cell)} for cell in CELLS[:3]]
    methods = [Method("searched", found, "best"), Method("drawn", drawn, "best")]
    rows = {title: {row[0]: row[1:] for row in table} for title, table in tables(methods).items()}
    mean = sum(NB201.truth(cell)["cifar10"] for cell in CELLS) / 12
    assert rows["Published accuracy"]["searched"][:2] == [12, f"{mean:.2f}"]
    assert rows["Published accuracy"]["drawn"][0] == 3
    assert len(rows) == 3
    assert [axes.get_title() for axes in by_epoch(methods, NB201).axes] == ["searched"]
    assert tables([Method("of another space", [{"truth": None}], "best")]) == {}
