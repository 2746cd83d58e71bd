"""Each variant against its paper's formula in a few lines, and DARTS itself where its strength is zero."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, batch, run_script, sgd
from test_extending import both_executions, two_steps
from torch import nn

from architect import Architect
from config import SearchConfig
from genotypes import parse
from models.choices import EXECUTIONS, PRIMITIVES
from models.choices import VARIANTS as CHOICES
from models.ops import OPS, MixedOp, PartialMixedOp
from models.search_cnn import SearchCNN
from running.errors import UserError
from variants import VARIANTS, compose


def classes(*words):
    """The classes of a run with these options."""
    return compose(SearchConfig(list(words)), SearchCNN, Architect)


def network(*words, execution="fused", C=4, epoch=None, n_layers=3, n_nodes=2):
    """A network of a variant, in float64; epoch: of 50, that it is prepared for."""
    torch.manual_seed(0)
    kind, _ = classes(*words)
    net = kind(1, C, 3, n_layers, nn.CrossEntropyLoss(), n_nodes=n_nodes, execution=execution)
    if epoch is not None:
        net.begin_epoch(epoch, 50)
    return net.double().to(memory_format=torch.channels_last)


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


def assert_same(one, other, rtol=1e-10, atol=1e-12):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def states(net):
    return {name: value for name, value in net.state_dict().items() if value.is_floating_point()}


def assert_is_darts(*words, epoch=1):
    """That the variant takes DARTS's steps, to the bit, under both executions."""
    for execution in EXECUTIONS:
        _, architect = classes(*words)
        darts, net = network(execution=execution), network(*words, execution=execution, epoch=epoch)
        net.load_state_dict(darts.state_dict(), strict=False)
        two_steps(darts)
        two_steps(net, architect)
        for name, value in states(darts).items():
            assert torch.equal(states(net)[name], value), name
        assert net.genotype() == darts.genotype()


WORDS = {
    "pc-darts": ["--variant", "pc-darts", "--pc-warm-up", "0"],
    "beta-darts": ["--variant", "beta-darts"],
    "darts-minus": ["--variant", "darts-minus"],
    "pc-darts,beta-darts": ["--variant", "pc-darts,beta-darts", "--pc-warm-up", "0"],
    "darts-minus,beta-darts": ["--variant", "darts-minus,beta-darts"],
}


def test_every_variant_is_tested_and_named_alike():
    assert set(VARIANTS) == set(CHOICES) == {name for name in WORDS if "," not in name}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_both_executions_of_a_variant_are_the_same(words):
    plain, fused = (network(*words, execution=execution, epoch=20) for execution in ("plain", "fused"))
    assert_same(gradients(fused, *words), gradients(plain, *words), rtol=1e-9, atol=1e-10)
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


@both_executions
def test_pc_darts_normalises_edges_in_the_network_and_in_the_genotype(execution):
    net = network(*WORDS["pc-darts"], execution=execution)
    with torch.no_grad():
        for number in net.alphas():
            number.normal_()
    for kind in ("normal", "reduce"):
        for i in range(2):
            alpha, beta = getattr(net, f"alpha_{kind}")[i], getattr(net, f"beta_{kind}")[i]
            expected = alpha.softmax(1) * (beta.exp() / beta.exp().sum())[:, None]
            torch.testing.assert_close(net.edge_weights()[kind][i], expected, rtol=1e-12, atol=0)
        assert getattr(net.genotype(), kind) == parse(net.edge_weights()[kind], 2)
    # a node is the sum of beta's softmax times the edge's output at alpha's softmax
    cell, s = net.cells[0], torch.randn(3, 12, 8, 8, dtype=torch.float64)
    weights = net.edge_weights()["normal"]
    s0, s1 = cell.preproc0(s), cell.preproc1(s)
    alpha, beta = net.alpha_normal[0].softmax(1), net.beta_normal[0].softmax(0)
    node = sum(b * edge(state, a) for b, a, edge, state in zip(beta, alpha, cell.dag[0], (s0, s1)))
    torch.testing.assert_close(cell(s, s, weights)[:, :4], node, rtol=1e-9, atol=1e-11)


def test_pc_darts_of_all_channels_without_betas_is_darts_to_the_bit():
    assert_is_darts("--variant", "pc-darts", "--pc-share", "1", "--pc-edge-normalisation", "off", "--pc-warm-up", "0")


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


@pytest.mark.process
def test_channels_that_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(UserError, match="--pc-share 4 must divide --init-channels 6"):
        network("--variant", "pc-darts", C=6)
    words = ["--variant", "pc-darts", "--init-channels", 6, "--layers", 3]
    assert_one_line_error(run_script("search.py", *words, cwd=tmp_path), "--pc-share 4")


# beta-DARTS


@both_executions
def test_beta_darts_adds_the_gradient_of_the_mean_logsumexp(execution):
    words = WORDS["beta-darts"]
    darts, net = network(execution=execution), network(*words, execution=execution, epoch=11)
    assert net.penalty == 50 * 10 / 50
    with torch.no_grad():
        for one, other in zip(darts.alphas(), net.alphas()):
            one.copy_(other.normal_())
    n = len(list(net.alphas()))
    with_penalty, without = gradients(net, *words)[-n:], gradients(darts)[-n:]
    n_edges = sum(len(alpha) for alpha in net.alphas())
    for one, other, alpha in zip(with_penalty, without, net.alphas()):
        # d logsumexp / d alpha is the softmax
        torch.testing.assert_close(one - other, 10 * alpha.detach().softmax(1) / n_edges, rtol=1e-7, atol=1e-9)


def test_beta_darts_is_darts_to_the_bit_at_the_start_and_with_strength_zero():
    assert_is_darts("--variant", "beta-darts")
    assert_is_darts("--variant", "beta-darts", "--beta-strength", "0", epoch=40)


# DARTS-


@pytest.mark.parametrize("epoch", [1, 26, 50])
@both_executions
def test_darts_minus_adds_a_skip_connection_that_fades_out(execution, epoch):
    net = network("--variant", "darts-minus", execution=execution, epoch=epoch)
    fading = {1: 1.0, 26: 0.5, 50: 0.02}[epoch]
    cell, s = net.cells[1], torch.randn(3, 8, 8, 8, dtype=torch.float64)  # a reduction cell
    assert net.reductions[1]
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


def test_darts_minus_is_darts_to_the_bit_with_strength_zero():
    assert_is_darts("--variant", "darts-minus", "--minus-strength", "0")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fast_execution_runs_every_edge_of_a_fast_variant(name, monkeypatch):
    net = network("--variant", name, epoch=1)

    def refuse(edge, x, weights):
        raise AssertionError("an edge ran by itself")

    for cell in net.cells:
        assert cell.execution == "fused"
    monkeypatch.setattr("models.fast.layout.Layout._separately", refuse, raising=False)
    called = []
    monkeypatch.setattr("models.fast.search_cell._mixed", wrapped("models.fast.search_cell", "_mixed", called))
    net(batch()[0])
    assert len(called) == 3 * 2  # cells, groups of sources


def wrapped(module, name, called):
    function = getattr(__import__(module, fromlist=[name]), name)

    def call(*args):
        called.append(args)
        return function(*args)

    return call


# As options


@pytest.mark.parametrize(
    ("names", "mention"),
    [
        ("pc-darts,darts-minus", "both change the operation on an edge"),
        ("beta-darts,beta-darts", "both change what alpha descends"),
        ("darts-plus", "pc-darts, beta-darts"),
        ("", "unknown variant ''"),
    ],
)
def test_variants_that_collide_or_do_not_exist_are_one_line(names, mention, capsys):
    with pytest.raises(SystemExit) as stop:
        SearchConfig(["--variant", names])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert mention in error


def test_without_a_variant_the_classes_are_those_given():
    assert list(compose(SimpleNamespace(variant=None), SearchCNN, Architect)) == [SearchCNN, Architect]


def test_a_variant_changes_a_users_classes_too():
    class Doubled(SearchCNN):
        def edge_weights(self, noise=None):
            return {kind: [2 * w for w in weights] for kind, weights in super().edge_weights(noise).items()}

    kind, _ = compose(SearchConfig(WORDS["pc-darts"]), Doubled, Architect)
    net = kind(1, 4, 3, 3, nn.CrossEntropyLoss(), n_nodes=2)
    assert net.edge_weights()["normal"][0].sum().item() == pytest.approx(2)
    assert type(net.cells[0].dag[0][0]) is PartialMixedOp
    assert MixedOp in PartialMixedOp.__mro__


@pytest.mark.process
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.process
def test_a_search_with_a_variant_runs_and_is_resumed(words, tmp_path):
    tiny = ["--layers", 3, "--init-channels", 4, "--nodes", 1, "--batch-size", 360, "--workers", 0, "--epochs", 2]
    process = run_script("search.py", *tiny, *words, "--eigenvalue-images", 2, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "run by their own forward" not in process.stdout
    run = tmp_path / "runs/search/digits"
    assert json.loads((run / "config.json").read_text())["variant"] == words[1]
    process = run_script("search.py", "--resume", run, "--epochs", 3, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(json.loads((run / "history.json").read_text())) == 3
