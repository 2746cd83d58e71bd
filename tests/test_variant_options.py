"""Variants as options: which are accepted, and how they go with classes of the user's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from architect import Architect
from command_line.errors import UserError
from config import SearchConfig
from models.ops import MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN
from variants import VARIANTS, by_node, compose


@pytest.mark.parametrize(
    ("names", "mention"),
    [
        ("pc-darts,darts-minus", "both change the operation on an edge"),
        ("beta-darts,beta-darts", "names a variant twice"),
        ("beta-darts,drnas", "both change what alpha descends"),
        ("pc-darts,fair-darts", "both change how edges are ranked"),
        ("snas,gdas", "both change how alphas become weights"),
        ("gdas,darts-minus", "both change the operation on an edge"),
        ("darts-plus", "pc-darts, beta-darts"),
        ("", "unknown variant ''"),
    ],
)
def test_variants_that_collide_or_do_not_exist_are_one_line(names, mention):
    with pytest.raises(UserError, match=mention):
        SearchConfig(["--variant", names])


def test_without_a_variant_the_classes_are_those_given():
    assert list(compose(SimpleNamespace(variant=None), SearchCNN, Architect)) == [SearchCNN, Architect]


def test_a_variant_changes_a_users_classes_too():
    class Doubled(SearchCNN):
        def edge_weights(self, noise=None):
            return {kind: [2 * w for w in weights] for kind, weights in super().edge_weights(noise).items()}

    kind, _ = compose(SearchConfig(["--variant", "pc-darts"]), Doubled, Architect)
    net = kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2)
    assert net.edge_weights()["normal"][0].sum().item() == pytest.approx(2)
    assert type(net.cells[0].dag[0][0]) is PartialMixedOp
    assert MixedOp in PartialMixedOp.__mro__


class Sigmoid(SearchCNN):
    def edge_weights(self, noise=None):
        return by_node(self, torch.sigmoid)


class OwnEdges(SearchCNN):
    mixed_op = type("OwnMixedOp", (MixedOp,), {})


@pytest.mark.parametrize(
    ("names", "base", "attribute"),
    [
        ("snas", Sigmoid, "edge_weights"),
        ("sdarts", Sigmoid, "edge_weights"),
        ("fair-darts", Sigmoid, "edge_weights"),
        ("pc-darts", OwnEdges, "mixed_op"),
        ("darts-minus", OwnEdges, "mixed_op"),
        ("gdas", OwnEdges, "mixed_op"),
    ],
)
def test_what_a_variant_would_replace_in_a_users_class_is_refused(names, base, attribute):
    with pytest.raises(UserError, match=f"replaces {attribute}, which {base.__name__} has overridden"):
        compose(SearchConfig(["--variant", names]), base, Architect)


@pytest.mark.parametrize(("names", "base"), [("pc-darts,beta-darts", Sigmoid), ("snas,beta-darts", OwnEdges)])
def test_what_a_variant_extends_in_a_users_class_is_kept(names, base):
    kind, _ = compose(SearchConfig(["--variant", names]), base, Architect)
    net = kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2)
    if base is OwnEdges:
        assert type(net.cells[0].dag[0][0]) is OwnEdges.mixed_op
    else:  # sigmoids of nearly zero, times the softmax of two betas
        assert net.edge_weights()["normal"][0].mean().item() == pytest.approx(0.25, abs=1e-3)


def test_the_number_of_edges_of_a_users_class_is_kept_by_every_variant():
    class ThreeEdges(SearchCNN):
        def genotype(self, k=3):
            return super().genotype(k)

    for name in VARIANTS:
        words = ["--fair-threshold", "0.1"] if name == "fair-darts" else []
        kind, _ = compose(SearchConfig(["--variant", name, *words]), ThreeEdges, Architect)
        net = kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2)
        assert list(map(len, net.genotype().normal)) == [2, 3], name


def test_alphas_that_never_learn_are_warned_of(capsys):
    def begin(warm_up):
        kind, _ = compose(SearchConfig(["--variant", "pc-darts", "--pc-warm-up", warm_up]), SearchCNN, Architect)
        kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2).begin_epoch(1, 5)
        return capsys.readouterr().err

    assert begin("4") == ""
    assert begin("5") == "warning: alphas learn after --pc-warm-up 5 epochs, and so never in 5\n"
