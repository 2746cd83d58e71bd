"""Variants as options, and with classes of a user's script."""

import importlib
import re
import textwrap

import pytest
import torch
from conftest import ROOT
from test_variants import WORDS
from torch import nn

from architect import Architect
from command_line.errors import UserError
from config import SearchConfig
from models.ops import MixedOp
from models.search_cnn import SearchCNN
from variants import VARIANTS, PCDarts, by_node, compose


@pytest.mark.parametrize(
    ("names", "mention"),
    [
        ("pc-darts,darts-minus", "both change the operation on an edge"),
        ("beta-darts,drnas", "both change what alpha descends"),
        ("pc-darts,fair-darts", "both change how edges are ranked"),
        ("snas,gdas", "both change how alphas become weights"),
        ("darts-plus", "pc-darts, beta-darts"),
    ],
)
def test_variants_that_collide_or_do_not_exist_are_one_line(names, mention):
    with pytest.raises(UserError, match=mention):
        SearchConfig(["--variant", names])


def test_an_option_of_a_variant_that_is_not_named_is_refused():
    with pytest.raises(UserError, match=r"^--pc-share is an option of --variant pc-darts$"):
        SearchConfig(["--pc-share", "2"])
    with pytest.raises(UserError, match="--pc-share: must be a whole number of at least 1"):
        SearchConfig(["--variant", "pc-darts", "--pc-share", "0"])


def test_options_of_a_variant_are_attributes_of_its_class_which_a_script_can_set():
    class Halved(PCDarts):
        pc_share = 2

    network, _ = compose(SearchConfig(["--variant", "pc-darts", "--pc-share", "1"]), SearchCNN, Architect)
    for kind, K in ((Halved, 2), (PCDarts, 4), (network, 1)):
        net = kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2)
        assert net.cells[0].dag[0][0].K == K
    with pytest.raises(UserError, match="--pc-share 4 must divide --init-channels 6"):
        PCDarts(1, 6, 3, 3, nn.CrossEntropyLoss())


class Sigmoid(SearchCNN):
    def edge_weights(self, noise=None):
        return by_node(self, torch.sigmoid)


class OwnEdges(SearchCNN):
    mixed_op = type("OwnMixedOp", (MixedOp,), {})


@pytest.mark.parametrize(
    ("names", "base", "attribute"),
    [
        ("snas", Sigmoid, "edge_weights"),
        ("fair-darts", Sigmoid, "edge_weights"),
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


@pytest.mark.long
def test_the_ninth_variant_of_the_docs_passes_its_tests_there(tmp_path, monkeypatch):
    text = (ROOT / "docs/variants.md").read_text(encoding="utf-8").partition("## Write a ninth variant")[2]
    found = re.findall(r"^   ```python\n(.*?)^   ```$", text, flags=re.MULTILINE | re.DOTALL)
    variant, line, words, tests = map(textwrap.dedent, found)
    names = "from variants import *\nfrom test_variants import *"
    tables = f"VARIANTS_LINE = {{{line}}}\nWORDS_LINE = {{{words}}}"
    (tmp_path / "ninth.py").write_text("\n\n\n".join((names, variant, tables, tests)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    ninth = importlib.import_module("ninth")
    monkeypatch.setitem(VARIANTS, "hardening", ninth.VARIANTS_LINE["hardening"])
    monkeypatch.setitem(WORDS, "hardening", ninth.WORDS_LINE["hardening"])
    run = [test for name, test in vars(ninth).items() if name.startswith("test_hardening")]
    assert len(run) == 1
    run[0]()
    assert SearchConfig(["--variant", "hardening", "--hardening-temperature", "0.5"]).hardening_temperature == 0.5
