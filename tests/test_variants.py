"""Each variant against its paper's formula in a few lines, and DARTS itself where its strength is zero."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Batches, batch, both_executions, sgd, small_net
from epochs import two_steps
from exact import XI, exact_alpha_gradient, relative_error
from torch import nn
from torch.distributions import Dirichlet

import search
from architect import Architect
from config import SearchConfig
from evidence.curvature import dominant_eigenvalue
from genotypes import parse
from models.ops import OPS, MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN
from run.run import Run
from utils import cosine_lr
from variants import VARIANTS, compose


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
    execution = "plain" if "gdas" in words else "fused"  # gdas has no other execution
    darts, net = network(execution=execution), network(*words, execution=execution, epoch=epoch)
    net.draw_noise = lambda: None
    net.load_state_dict(darts.state_dict(), strict=False)
    two_steps(darts)
    two_steps(net, classes(*words)[1])
    for name, value in darts.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


@pytest.mark.long
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_both_executions_of_a_variant_are_the_same(words, layout):
    plain, fused = (network(*words, execution=execution, epoch=20) for execution in ("plain", "fused"))
    for one, other in zip(gradients(fused, *words), gradients(plain, *words), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fused.eval()(batch()[0]), plain.eval()(batch()[0]), rtol=1e-10, atol=1e-12)


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
        weights = net.edge_weights()[kind]
        for alpha, beta, found in zip(getattr(net, f"alpha_{kind}"), getattr(net, f"beta_{kind}"), weights):
            expected = alpha.softmax(1) * (beta.exp() / beta.exp().sum())[:, None]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert getattr(net.genotype(), kind) == parse(weights, 2)


def test_pc_darts_betas_learn_as_alphas_do_and_neither_does_in_the_warm_up():
    words = ["--variant", "pc-darts", "--pc-warm-up", "2"]
    for epoch, learns in ((1, False), (2, False), (3, True)):
        net = network(*words, epoch=epoch)
        before, weights = ([p.detach().clone() for p in group] for group in (net.alphas(), net.weights()))
        if learns:
            two_steps(net)
        else:
            with pytest.raises(AttributeError):  # the alphas have no gradients that could be returned
                two_steps(net)
        assert all((number != old).any() == learns for number, old in zip(net.alphas(), before))
        assert all((w != old).any() for w, old in zip(net.weights(), weights) if w.dim() == 4)


# DARTS-


@pytest.mark.parametrize(("epoch", "epochs", "fading"), [(1, "50", 1), (26, "100", 0.75), (26, "20", 0)])
@both_executions
def test_darts_minus_adds_a_skip_connection_that_fades_out(execution, epoch, epochs, fading):
    net = network("--variant", "darts-minus", "--minus-epochs", epochs, execution=execution, epoch=epoch)
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
    for epoch, expected in ((1, first), (26, (first + last) / 2), (51, last)):
        net.begin_epoch(epoch, 51)
        assert net.temperature == pytest.approx(expected, rel=1e-12)


def test_gdas_moves_w_as_the_sum_of_all_candidates_does():
    """Those of weight zero have no gradient; momentum and decay move them."""
    kind, architect = classes("--variant", "gdas")

    class AllRun(kind):
        mixed_op = MixedOp
        forward = SearchCNN.forward

        def drawn(self, alpha, gumbel):  # without gradients of the weights that are zero
            weights = super().drawn(alpha, gumbel)
            return weights * weights.detach()

    nets = [small_net(kind=kind), small_net(kind=AllRun)]
    for net in nets:
        net.begin_epoch(25, 50)
        torch.manual_seed(1)
        two_steps(net, architect)
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
    """A search network whose weights are computed by a test, which sets `definition`."""

    def edge_weights(self, noise=None):
        return self.definition(self)


def by_definition_of(name, net):
    """A DARTS network with the same parameters, whose weights are those of the variant's definition."""
    T = getattr(net, "temperature", 1)

    def weights(twin):
        alphas = {"normal": twin.alpha_normal, "reduce": twin.alpha_reduce}
        if name != "drnas":
            pairs = {kind: zip(nodes, (net.noise or alphas)[kind]) for kind, nodes in alphas.items()}
            return {kind: [DEFINITIONS[name](alpha, g, T) for alpha, g in pairs[kind]] for kind in alphas}
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
