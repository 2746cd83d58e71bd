"""Each variant against its paper's formula in a few lines, and DARTS itself where its strength is zero."""

import importlib
import json
import math
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from comparing import differences, outcome
from conftest import ROOT, Batches, batch, run_script, sgd, small_net
from test_architect import XI, exact_alpha_gradient, relative_error
from test_extending import both_executions, two_steps
from test_resuming import wait_for_step
from torch import nn
from torch.distributions import Dirichlet

import search
from architect import Architect
from command_line.errors import UserError
from config import SearchConfig
from evidence.curvature import dominant_eigenvalue
from genotypes import parse
from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import OPS, MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN
from run.run import Run
from utils import cosine_lr
from variants import VARIANTS, PCDarts, by_node, compose


def classes(*words):
    """The classes of a run with these options."""
    return compose(SearchConfig(list(words)), SearchCNN, Architect)


def network(*words, execution="fused", C=4, epoch=None, n_layers=3, n_nodes=2):
    """A network of a variant, in float64, with a draw; epoch: of 50, that it is prepared for."""
    torch.manual_seed(0)
    kind, _ = classes(*words)
    net = kind(1, C, 3, n_layers, nn.CrossEntropyLoss(), n_nodes=n_nodes, execution=execution)
    if epoch is not None:
        net.begin_epoch(epoch, 50)
    net = net.double().to(memory_format=torch.channels_last)
    net.noise = net.draw_noise()
    return net


def gradients(net, *words, xi=0.1):
    """Logits and loss, all gradients, and the alphas' second-order gradients."""
    net.train()
    (X, y), val = batch(seed=1), batch(seed=2)
    logits = net(X)
    loss = net.criterion(logits, y)
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)
    _, architect = classes(*words)
    architect(net, 0.9, 3e-4).unrolled_backward(X, y, *val, xi, sgd(net))
    return [logits, loss, *grads, *(alpha.grad for alpha in net.alphas())]


WORDS = {
    "pc-darts": ["--variant", "pc-darts", "--pc-warm-up", "0"],
    "beta-darts": ["--variant", "beta-darts"],
    "darts-minus": ["--variant", "darts-minus"],
    "pc-darts,beta-darts": ["--variant", "pc-darts,beta-darts", "--pc-warm-up", "0"],
    "darts-minus,beta-darts": ["--variant", "darts-minus,beta-darts"],
    "fair-darts": ["--variant", "fair-darts"],
    "gdas": ["--variant", "gdas"],
    "snas": ["--variant", "snas"],
    "drnas": ["--variant", "drnas", "--drnas-kl-strength", "0.1"],
    "sdarts": ["--variant", "sdarts"],
    "drnas,pc-darts": ["--variant", "drnas,pc-darts", "--pc-warm-up", "0", "--drnas-kl-strength", "0.1"],
    "sdarts,darts-minus": ["--variant", "sdarts,darts-minus"],
}


def test_every_variant_is_tested():
    assert set(VARIANTS) == {name for name in WORDS if "," not in name}


# (options with which a variant is DARTS, the epoch, of 50)
WITHOUT_EFFECT = [
    (["--variant", "pc-darts", "--pc-share", "1", "--pc-edge-normalisation", "off", "--pc-warm-up", "0"], 1),
    (["--variant", "beta-darts"], 1),
    (["--variant", "beta-darts", "--beta-strength", "0"], 40),
    (["--variant", "darts-minus", "--minus-strength", "0"], 1),
    (["--variant", "sdarts", "--sdarts-radius", "0"], 20),
    *((["--variant", name], 20) for name in ("gdas", "snas", "drnas")),  # of which nothing is drawn here
]


@pytest.mark.long
@pytest.mark.parametrize(("words", "epoch"), WITHOUT_EFFECT, ids=str)
def test_a_variant_without_effect_takes_the_steps_of_darts_to_the_bit(words, epoch):
    for execution in ["plain"] if "gdas" in words else EXECUTIONS:  # gdas has no other execution
        darts, net = network(execution=execution), network(*words, execution=execution, epoch=epoch)
        net.draw_noise = lambda: None
        net.load_state_dict(darts.state_dict(), strict=False)
        two_steps(darts)
        two_steps(net, classes(*words)[1])
        for name, value in darts.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name
        assert net.genotype() == darts.genotype()


@pytest.mark.long
@pytest.mark.parametrize("layout", [None, "BATCHED"])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_both_executions_of_a_variant_are_the_same(words, layout, monkeypatch):
    if layout:
        monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, layout))
    plain, fused = (network(*words, execution=execution, epoch=20) for execution in ("plain", "fused"))
    for one, other in zip(gradients(fused, *words), gradients(plain, *words), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for net in (plain, fused):
        net.eval()
    torch.testing.assert_close(fused(batch()[0]), plain(batch()[0]), rtol=1e-10, atol=1e-12)


# PC-DARTS


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 7])
def test_pc_darts_mixes_a_quarter_of_the_channels_and_shuffles(stride, size):
    torch.manual_seed(0)
    edge = PartialMixedOp(8, stride, K=4).double()
    x, weights = torch.randn(3, 8, size, size, dtype=torch.float64), torch.rand(8, dtype=torch.float64).softmax(0)
    mixed = sum(w * op(x[:, :2]) for w, op in zip(weights, edge._ops))
    rest = x[:, 2:] if stride == 1 else F.max_pool2d(F.pad(x[:, 2:], (0, size % 2, 0, size % 2), value=-9e9), 2)
    groups = torch.cat([mixed, rest], dim=1).split(2, dim=1)  # four groups of two channels
    shuffled = torch.stack([group[:, i] for i in range(2) for group in groups], dim=1)
    torch.testing.assert_close(edge(x, weights), shuffled, rtol=1e-10, atol=1e-12)


def test_pc_darts_normalises_edges_in_the_network_and_in_the_genotype():
    net = network(*WORDS["pc-darts"])
    with torch.no_grad():
        for number in net.alphas():
            number.normal_()
    for kind in ("normal", "reduce"):
        for i in range(2):
            alpha, beta = getattr(net, f"alpha_{kind}")[i], getattr(net, f"beta_{kind}")[i]
            expected = alpha.softmax(1) * (beta.exp() / beta.exp().sum())[:, None]
            torch.testing.assert_close(net.edge_weights()[kind][i], expected, rtol=1e-12, atol=0)
        assert getattr(net.genotype(), kind) == parse(net.edge_weights()[kind], 2)


def test_pc_darts_betas_learn_as_alphas_do_and_neither_does_in_the_warm_up():
    words = ["--variant", "pc-darts", "--pc-warm-up", "2"]
    for epoch, learns in ((1, False), (2, False), (3, True)):
        net = network(*words, epoch=epoch)
        before = [number.detach().clone() for number in net.alphas()]
        assert len(before) == 8
        weights = [w.detach().clone() for w in net.weights()]
        if learns:
            two_steps(net)
        else:
            with pytest.raises(AttributeError):  # the alphas have no gradients that could be returned
                two_steps(net)
        assert all((number != old).any() == learns for number, old in zip(net.alphas(), before))
        assert all((w != old).any() for w, old in zip(net.weights(), weights) if w.dim() == 4)


# DARTS-


@pytest.mark.parametrize("epoch", [1, 26, 50])
@both_executions
def test_darts_minus_adds_a_skip_connection_that_fades_out(execution, epoch):
    net = network("--variant", "darts-minus", execution=execution, epoch=epoch)
    fading = {1: 1.0, 26: 0.5, 50: 0.02}[epoch]
    cell, s = net.cells[1], torch.randn(3, 8, 8, 8, dtype=torch.float64)  # a reduction cell
    assert net.kinds[1] == "reduce"
    alphas = net.alpha_reduce
    cell.preproc0, cell.preproc1 = nn.Identity(), nn.Identity()
    states = [s, s + 1]
    for alpha, edges in zip(alphas, cell.dag):
        total = 0
        for weights, edge, x in zip(alpha.softmax(1), edges, states):
            *candidates, auxiliary = edge._ops
            total = total + sum(w * op(x) for w, op in zip(weights, candidates)) + fading * auxiliary(x)
        states.append(total)
    nodes = cell(s, s + 1, net.operation_weights()["reduce"])
    torch.testing.assert_close(nodes, torch.cat(states[2:], 1), rtol=1e-9, atol=1e-10)
    assert type(cell.dag[0][0]._ops[-1]) is type(OPS["skip_connect"](4, 2, False))
    assert type(cell.dag[1][2]._ops[-1]) is type(OPS["skip_connect"](4, 1, False))
    assert {w.shape[1] for nodes in net.edge_weights().values() for w in nodes} == {len(PRIMITIVES)}


# What is drawn


RANDOM = ("gdas", "snas", "drnas", "sdarts")


def moved(net, seed=1):
    """The network, with alphas that are far from the start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.normal_()
    net.noise = net.draw_noise()
    return net


def edges(by_kind):
    """The rows of {kind: [rows of a node's edges]}, in one tensor."""
    return torch.cat([rows for kind in ("normal", "reduce") for rows in by_kind[kind]])


def alphas_of(net):
    return torch.cat([*net.alpha_normal, *net.alpha_reduce])


@pytest.mark.parametrize("name", RANDOM)
def test_nothing_is_drawn_in_evaluation_for_the_genotype_nor_for_the_eigenvalue(name):
    net = moved(network("--variant", name, epoch=25))
    net.eval()
    darts = network()
    darts.load_state_dict(net.state_dict())
    state = torch.get_rng_state()
    torch.testing.assert_close(net(batch()[0]), darts.eval()(batch()[0]), rtol=1e-9, atol=1e-11)
    assert torch.equal(edges(net.edge_weights()), alphas_of(net).softmax(1))
    assert net.genotype() == darts.genotype()
    assert torch.equal(torch.get_rng_state(), state)
    assert dominant_eigenvalue(net, *batch()) == pytest.approx(dominant_eigenvalue(darts, *batch()), rel=1e-8)
    net.train()
    assert not torch.allclose(net(batch()[0]), darts.train()(batch()[0]), rtol=1e-3)


def test_gdas_draws_a_candidate_with_the_probability_of_its_softmax_weight():
    net, n = moved(network("--variant", "gdas", epoch=25, n_nodes=1)), 2000
    with torch.no_grad():
        sample = torch.stack([edges(net.edge_weights(net.draw_noise())) for _ in range(n)])
        p = alphas_of(net).softmax(1)
    assert torch.equal(sample.sort(2).values, F.one_hot(torch.full(sample.shape[:2], 7), 8).double())
    assert ((sample.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize(("name", "first", "last"), [("gdas", 10, 0.1), ("snas", 1, 0.03)])
def test_temperatures_fall_linearly_from_the_first_epoch_to_the_last(name, first, last):
    net = network("--variant", name)
    found = []
    for epoch in (1, 26, 51):
        net.begin_epoch(epoch, 51)
        found.append(net.temperature)
    assert found == pytest.approx([first, (first + last) / 2, last], rel=1e-12)
    net.begin_epoch(1, 1)
    assert net.temperature == first


def test_gdas_runs_one_candidate_on_each_edge(monkeypatch):
    net, ran = network("--variant", "gdas", epoch=25), []
    for cell in net.cells:
        for edge in (edge for node in cell.dag for edge in node):
            for op in edge._ops:
                op.register_forward_hook(lambda op, inputs, output, edge=edge: ran.append(edge))
    net(batch()[0])
    assert len(ran) == len(set(ran)) == 3 * 5  # cells, edges


def test_gdas_moves_w_as_the_sum_of_all_candidates_does():
    """Those of weight zero have no gradient; momentum and decay move them."""
    kind, architect = classes("--variant", "gdas")

    class AllRun(kind):
        mixed_op = MixedOp
        forward = SearchCNN.forward

        def drawn(self, alpha, gumbel):  # without gradients of the weights that are zero
            weights = super().drawn(alpha, gumbel)
            return weights * weights.detach()

    nets = []
    for cls in (kind, AllRun):
        torch.manual_seed(0)
        nets.append(cls(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2).double())
        nets[-1].begin_epoch(25, 50)
        torch.manual_seed(1)
        two_steps(nets[-1], architect)
    for (name, w), other in zip(nets[0].named_parameters(), nets[1].parameters()):
        torch.testing.assert_close(w, other, rtol=1e-7, atol=1e-9, msg=name)


# The alphas' gradients against exact differentiation of definitions

DEFINITIONS = {
    "beta-darts": lambda alpha, noise, T: alpha.softmax(1),
    "fair-darts": lambda alpha, noise, T: 1 / (1 + (-alpha).exp()),
    "snas": lambda alpha, noise, T: ((alpha + noise) / T).exp() / ((alpha + noise) / T).exp().sum(1, keepdim=True),
    "gdas": lambda alpha, noise, T: straight_through(((alpha + noise) / T).softmax(1)),
    "sdarts": lambda alpha, noise, T: alpha.softmax(1),  # alpha's steps are DARTS's
}


def straight_through(soft):
    """One where a row is largest, with the derivative of the row's largest number; else zero."""
    rows = []
    for row in soft:
        drawn = row.argmax().item()
        rows.append(torch.stack([1 + p - p.detach() if i == drawn else 0 * p.detach() for i, p in enumerate(row)]))
    return torch.stack(rows)


def penalty(name, alphas):
    """What the variant adds to alpha's objective."""
    if name == "beta-darts":  # 50 times the part of the epochs that are over, times the mean logsumexp
        return 50 * 44 / 50 * alphas.exp().sum(1).log().mean()
    if name == "fair-darts":
        return -10 * ((alphas.sigmoid() - 0.5) ** 2).mean()
    if name == "drnas":  # 0.1 times the divergences, by the gamma function and its logarithmic derivative
        beta = F.elu(alphas) + 1
        total = beta.sum(1)
        logs = total.lgamma() - beta.lgamma().sum(1) - math.lgamma(beta.shape[1])
        return 0.1 * (logs + ((beta - 1) * (beta.digamma() - total.digamma()[:, None])).sum(1)).sum()
    return 0 * alphas.sum()


class DefinedCNN(SearchCNN):
    """A search network whose weights are computed by a test."""

    definition = None

    def edge_weights(self, noise=None):
        return self.definition(self)


def by_definition_of(name, net):
    """A DARTS network with the same parameters, whose weights are those of the variant's definition."""

    def weights(twin):
        alphas = {"normal": twin.alpha_normal, "reduce": twin.alpha_reduce}
        if name != "drnas":
            noise = net.noise or alphas
            return {
                kind: [
                    DEFINITIONS[name](alpha, g, getattr(net, "temperature", 1)) for alpha, g in zip(nodes, noise[kind])
                ]
                for kind, nodes in alphas.items()
            }
        with torch.random.fork_rng():
            torch.manual_seed(7)
            rows = iter(Dirichlet(F.elu(alphas_of(twin)) + 1).rsample().split([2, 3, 2, 3]))
        return {kind: [next(rows) for _ in nodes] for kind, nodes in alphas.items()}

    twin = small_net(smooth=True, kind=DefinedCNN, execution="plain")
    twin.load_state_dict(net.state_dict())
    twin.definition = weights
    return twin


@pytest.mark.parametrize("xi", [0.0, XI], ids=["first order", "second order"])
@pytest.mark.parametrize("name", ["beta-darts", "fair-darts", *RANDOM])
def test_alphas_gradient_is_that_of_differentiating_the_definition(name, xi):
    kind, architect = classes(*WORDS[name])
    net = small_net(smooth=True, kind=kind)
    net.begin_epoch(45, 50)  # gdas and snas are cold, so that their gradients differ from DARTS's
    moved(net)
    torch.manual_seed(7)
    net.noise = net.draw_noise()
    noise, trn, val, optim = net.noise, batch(seed=1), batch(seed=2), sgd(net, steps=2)
    twin = by_definition_of(name, net)
    exact = exact_alpha_gradient(twin, trn, val, xi, optim)
    if xi:  # so that this measures H
        assert relative_error(exact_alpha_gradient(twin, trn, val, 0.0, optim), exact) > 1e-3
    added = torch.autograd.grad(penalty(name, alphas_of(twin)), list(twin.alphas()))
    loss = architect(net, 0.9, 3e-4, eps_scale=1e-5).unrolled_backward(*trn, *val, xi, optim)
    found = [alpha.grad for alpha in net.alphas()]
    assert relative_error(found, [a + b for a, b in zip(exact, added)]) < 1e-6
    assert net.noise is noise
    if xi == 0:
        expected = twin.loss(*val) + penalty(name, alphas_of(twin))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)


# Fair DARTS


def test_fair_darts_keeps_operations_above_the_threshold_and_one_at_least():
    net = network("--variant", "fair-darts")
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.fill_(-2)
            alpha[:, 7] = 5  # none is no operation
        net.alpha_normal[0][0, 3], net.alpha_normal[0][0, 4] = 2.0, 2.1  # 0.881, 0.891; an edge keeps one of them
        net.alpha_normal[0][1, 0] = 1.8  # 0.858
        net.alpha_normal[1][2, 2], net.alpha_normal[1][0, 6] = 1.8, 1.7  # 0.846
        net.alpha_reduce[0][1, 5] = 1.0
    genotype = net.genotype()
    assert genotype.normal == [[("sep_conv_5x5", 0), ("max_pool_3x3", 1)], [("skip_connect", 2)]]
    assert genotype.reduce[0] == [("dil_conv_3x3", 1)]  # none is above it
    assert list(map(len, genotype.reduce)) == [1, 1]
    assert net.genotype(k=1).normal == [[("sep_conv_5x5", 0)], [("skip_connect", 2)]]


# SDARTS


def test_sdarts_perturbs_the_weights_of_ws_step_within_its_radius():
    net = moved(network("--variant", "sdarts", epoch=26))
    assert net.radius == pytest.approx(0.03 + 0.27 * 25 / 50, rel=1e-12)
    for kind, alphas in (("normal", net.alpha_normal), ("reduce", net.alpha_reduce)):
        for alpha, delta, weights in zip(alphas, net.noise[kind], net.edge_weights(net.noise)[kind]):
            assert 0.5 * net.radius < delta.abs().max() <= net.radius
            for row, shift, found in zip(alpha.softmax(1), delta, weights):
                clipped = (row + shift).clamp(0, 1)
                torch.testing.assert_close(found, clipped / clipped.sum(), rtol=1e-12, atol=0)
    all_negative = {kind: [torch.full_like(d, -1) for d in net.noise[kind]] for kind in net.noise}
    weights = net.edge_weights(all_negative)["normal"][1]
    assert torch.equal(weights, F.one_hot(net.alpha_normal[1].argmax(1), 8).double())


def test_sdarts_takes_ws_step_by_the_perturbed_loss_and_alphas_by_darts():
    trn, val = batch(n=8, seed=10), batch(n=8, seed=50)
    config = SearchConfig(["--device", "cpu", "--overwrite"])
    net, architect = network("--variant", "sdarts", epoch=26), classes("--variant", "sdarts")[1]
    darts = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    w_optim, alpha_optim = sgd(net, momentum=0.9), torch.optim.SGD(net.alphas(), 0.01)
    bilevel, scheduler = architect(net, 0.9, 3e-4), cosine_lr(w_optim, 50)
    search.train(1, Run(config), net, bilevel, Batches([trn]), Batches([val]), w_optim, alpha_optim, scheduler)
    Architect(darts.train(), 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, sgd(darts))
    assert all(torch.equal(alpha.grad, other.grad) for alpha, other in zip(net.alphas(), darts.alphas()))
    # w as it was before the step, alpha as it is after it
    twin = DefinedCNN(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2, execution="plain").double()
    twin.load_state_dict(before | {name: value for name, value in net.state_dict().items() if "alpha" in name})
    twin.definition = lambda twin: net.edge_weights(net.noise)
    twin.loss(*trn).backward(inputs=list(twin.weights()))
    nn.utils.clip_grad_norm_(twin.weights(), config.w_grad_clip)
    for w, other in zip(net.weights(), twin.weights()):
        torch.testing.assert_close(w.grad, other.grad, rtol=1e-8, atol=1e-11)


def test_edge_normalisation_multiplies_drawn_weights_in_whatever_order_the_variants_are_named():
    for names in ("drnas,pc-darts", "pc-darts,drnas"):
        net = moved(network("--variant", names, "--pc-warm-up", "0"))
        theta, _ = net.noise["normal"][1]
        expected = theta * net.beta_normal[1].softmax(0)[:, None]
        torch.testing.assert_close(net.edge_weights(net.noise)["normal"][1], expected, rtol=1e-12, atol=0)
        order = [kind.__name__ for kind in type(net).__mro__[:5]]
        assert order == ["PCDartsDrNasSearchCNN", "PCDarts", "DrNas", "NetworkVariant", "SearchCNN"]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fast_execution_can_run_the_cells_of_every_variant_but_gdas(name):
    net, x = network("--variant", name, epoch=1), torch.randn(3, 4, 8, 8, dtype=torch.float64)
    weights = net.operation_weights(net.noise)
    for cell, kind in zip(net.cells, net.kinds):
        assert search_cell.can_run(cell.dag, x, weights[kind]) == (name != "gdas")


# As options, and with classes of a user's script


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


def test_an_option_of_a_variant_that_is_not_named_is_refused():
    with pytest.raises(UserError, match=r"^--pc-share is an option of --variant pc-darts$"):
        SearchConfig(["--pc-share", "2"])
    with pytest.raises(UserError, match="--gdas-temperature=3 is an option of --variant gdas"):
        SearchConfig(["--variant", "snas", "--gdas-temperature=3"])
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


def test_alphas_that_never_learn_are_warned_of(capsys):
    def begin(warm_up):
        kind, _ = compose(SearchConfig(["--variant", "pc-darts", "--pc-warm-up", warm_up]), SearchCNN, Architect)
        kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2).begin_epoch(1, 5)
        return capsys.readouterr().err

    assert begin("4") == ""
    assert begin("5") == "warning: alphas learn after --pc-warm-up 5 epochs, and so never in 5\n"


# The docs, and resuming


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


TINY = ["--layers", 3, "--init-channels", 4, "--nodes", 1, "--workers", 0, "--epochs", 2, "--eigenvalue-images", 2]


@pytest.mark.process
@pytest.mark.parametrize("name", ["gdas", "drnas,pc-darts"])
def test_a_search_with_a_variant_that_is_stopped_and_resumed_ends_as_one_left_alone(name, tmp_path):
    alone, stopped = (tmp_path / name / "runs/search/digits" for name in ("alone", "stopped"))
    for run in (alone, stopped):
        (run.parents[2]).mkdir()
    words = [*WORDS[name], *TINY, "--batch-size", 180, "--checkpoint-minutes", 0]
    process = run_script("search.py", *words, cwd=alone.parents[2])
    assert process.returncode == 0, process.stderr
    assert ("run by their own forward" in process.stdout) == (name == "gdas")
    assert json.loads((alone / "config.json").read_text())["variant"] == name
    command = [sys.executable, ROOT / "search.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=stopped.parents[2], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(process, stopped, 1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error
    process = run_script("search.py", "--resume", stopped, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert differences(outcome(alone), outcome(stopped)) == []
