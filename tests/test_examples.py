"""The small studies of examples/, which docs/changing.md shows: each has its effect, under both executions."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Batches, batch, both_executions, sgd, small_net
from epochs import two_steps
from exact import by_definition
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import augment
import search
from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2, from_str
from models.augment_cnn import AugmentCNN
from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import OPS
from models.search_cnn import SearchCNN
from run.loggers import Logger
from run.run import Run

EXAMPLES = ["sigmoid", "gumbel", "l1_penalty", "half_channels", "new_operation", "w_penalty"]
pytestmark = pytest.mark.usefixtures("short_runs")
NEW_SPACE = ("none", "skip_connect", "sep_conv_3x3", "max_pool_5x5")


@pytest.fixture(autouse=True)
def operations_of_examples_are_forgotten():
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


def classes_of(name):
    """The network's and the architect's class with which an example calls search.main."""
    arguments = arguments_of(name)
    return arguments.get("network", SearchCNN), arguments.get("architect", Architect)


def arguments_of(name):
    """What an example passes to search.main or augment.main."""
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        for script in (search, augment):
            patch.setattr(script, "main", lambda **options: arguments.update(options))
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return arguments


def network(kind, execution, primitives=PRIMITIVES, C=4):
    torch.manual_seed(0)
    net = kind(1, C, 3, 3, nn.CrossEntropyLoss(), n_nodes=2, execution=execution, primitives=primitives)
    return net.double().to(memory_format=torch.channels_last)


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_both_executions_of_an_example_are_the_same_search(name):
    kind, architect = classes_of(name)
    primitives = NEW_SPACE if name == "new_operation" else PRIMITIVES
    states = {}
    for execution in EXECUTIONS:
        net = network(kind, execution, primitives)
        torch.manual_seed(1)  # of noise
        two_steps(net, architect)
        states[execution] = dict(net.named_parameters()) | {"logits": net.eval()(batch()[0])}
    for key, value in states["plain"].items():
        # eq. 7 divides rounding by eps; ReLUs and maxima can take another branch for it, which the seed avoids
        torch.testing.assert_close(states["fused"][key], value, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.long
@both_executions
def test_gumbel_noise_is_drawn_once_a_step_and_never_in_evaluation(execution):
    kind, _ = classes_of("gumbel")
    net, draws, used = network(kind, execution), [], []

    class Watched(kind):
        def draw_noise(self):
            draws.append(super().draw_noise())
            return draws[-1]

        def edge_weights(self, noise=None):
            used.append(noise)
            return super().edge_weights(noise)

    net.__class__ = Watched
    two_steps(net)
    assert len(draws) == 2
    assert not torch.equal(draws[0]["normal"][0], draws[1]["normal"][0])
    passes = len(used) // 2  # of the second-order step: w', L_V, two of eq. 7, w
    assert passes == 5
    assert all(noise is draws[0] for noise in used[:passes])
    assert all(noise is draws[1] for noise in used[passes:])
    X, y = batch()
    noisy, used[:] = net.loss(X, y).item(), []
    net.eval()
    quiet = net.loss(X, y).item()
    net.genotype()
    assert used == [None, None]
    assert noisy != quiet == net.loss(X, y).item()


@both_executions
def test_an_l1_penalty_adds_its_gradient_to_the_alphas(execution):
    _, architect = classes_of("l1_penalty")
    gradients = {}
    for kind in (Architect, architect):
        net = network(SearchCNN, execution)
        kind(net, 0.9, 3e-4).unrolled_backward(*batch(seed=1), *batch(seed=2), 0.1, sgd(net))
        gradients[kind] = [alpha.grad for alpha in net.alphas()]
    for with_penalty, without, alpha in zip(gradients[architect], gradients[Architect], net.alphas()):
        torch.testing.assert_close(with_penalty - without, 0.01 * alpha.detach().sign(), rtol=0, atol=1e-10)


@both_executions
def test_half_of_the_channels_pass_by(execution, monkeypatch, log_lines):
    kind, _ = classes_of("half_channels")
    search_cell._log_class.cache_clear()
    net, called = network(kind, execution), []
    for cell in net.cells:
        for edge in (edge for node in cell.dag for edge in node):
            edge.register_forward_hook(lambda edge, inputs, output: called.append((edge, inputs[0], output)))
    two_steps(net)
    assert len(called) == 2 * 5 * 3 * 5  # steps, passes, cells, edges
    for edge, x, y in called:
        passed = x[:, x.shape[1] // 2 :]
        assert torch.equal(
            y[:, y.shape[1] // 2 :], F.max_pool2d(passed, 2, ceil_mode=True) if edge.stride == 2 else passed
        )
    assert sum("own forward" in line for line in log_lines) == (execution == "fused")


# Objectives, optimizers, selection, loggers, batches.


@both_executions
def test_an_objective_of_w_is_in_the_step_of_w_the_virtual_step_and_eq_7(execution):
    _, kind = classes_of("w_penalty")
    net = network(SearchCNN, execution)
    X, y = batch(seed=1)
    plain, sparse = Architect(net, 0.9, 3e-4), kind(net, 0.9, 3e-4)
    signs = [1e-5 * w.detach().sign() for w in net.weights()]
    for virtual, usual, sign in zip(*(a.virtual_step(X, y, 0.1, sgd(net)) for a in (sparse, plain)), signs):
        torch.testing.assert_close(virtual, usual - 0.1 * sign, rtol=0, atol=1e-12)
    assert sparse.alpha_objective(X, y) == plain.alpha_objective(X, y)
    gradients = []
    for architect in (plain, sparse):
        for w in net.weights():
            w.grad = None
        search.w_backward(X, y, net, architect, list(net.weights()), torch.autocast("cpu", enabled=False))
        gradients.append([w.grad for w in net.weights()])
    for usual, other, sign in zip(*gradients, signs):
        torch.testing.assert_close(other - usual, sign, rtol=0, atol=1e-12)


@both_executions
def test_an_overridden_loss_is_what_both_w_and_alpha_descend(execution):
    class SmoothedCNN(SearchCNN):
        def loss(self, X, y):
            return F.cross_entropy(self(X), y, label_smoothing=0.3)

    net = network(SmoothedCNN, execution).train()
    X, y = batch(seed=1)
    expected = F.cross_entropy(net(X), y, label_smoothing=0.3).detach()
    weights, architect = list(net.weights()), Architect(net, 0.9, 3e-4)
    _, loss = search.w_backward(X, y, net, architect, weights, torch.autocast("cpu", enabled=False))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(architect.unrolled_backward(X, y, X, y, 0.0, None), expected)


OPTIMIZERS = ["nesterov", "adam"]


def architect_and_optimizer(name, net, eps_scale, steps):
    """The architect of --w-nesterov or of an example, and its optimizer of w after some steps."""
    words = ["--w-lr", "0.02", "--w-weight-decay", "0.01", *["--w-nesterov"] * (name == "nesterov")]
    config, kind = SearchConfig(words), Architect if name == "nesterov" else classes_of(name)[1]
    optim = kind.w_optimizer(net.weights(), config)
    for step in range(steps):
        optim.zero_grad()
        net.loss(*batch(seed=100 + step)).backward(inputs=list(net.weights()))
        optim.step()
    return kind(net, config.w_momentum, config.w_weight_decay, eps_scale), optim


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_virtual_step_is_the_step_that_the_optimizer_takes(name, steps):
    net = small_net(smooth=True).train()
    architect, optim = architect_and_optimizer(name, net, 0.01, steps)
    X, y = batch(seed=1)
    virtual = architect.virtual_step(X, y, 0.02, optim)
    optim.zero_grad()
    net.loss(X, y).backward(inputs=list(net.weights()))
    optim.step()
    for w, expected in zip(virtual, net.weights()):
        torch.testing.assert_close(w, expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eq_6_is_exact_through_the_update_of_any_optimizer(name, steps):
    """Against differentiation through the update. Adam's w' is not linear in the gradient, so d alone is not enough."""
    net, xi = by_definition(small_net(smooth=True)).train(), 0.02
    architect, optim = architect_and_optimizer(name, net, 1e-5, steps)
    (X, y), validation = batch(seed=1), batch(seed=2)
    weights, alphas = list(net.weights()), list(net.alphas())
    grads = torch.autograd.grad(net.loss(X, y), weights, create_graph=True)
    virtual = [w.detach() - xi * u for w, u in zip(weights, architect.w_update(grads, optim))]
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    moved = {names[id(w)]: value for w, value in zip(weights, virtual)}
    logits = torch.func.functional_call(net, moved, (validation[0],))
    exact = torch.autograd.grad(net.criterion(logits, validation[1]), alphas)
    architect.unrolled_backward(X, y, *validation, xi, optim)
    error = torch.cat([(alpha.grad - e).flatten() for alpha, e in zip(alphas, exact)]).norm()
    assert error < 1e-5 * torch.cat([e.flatten() for e in exact]).norm()
    first_order = torch.autograd.grad(net.loss(*validation), alphas)
    assert error < 0.01 * torch.cat([(f - e).flatten() for f, e in zip(first_order, exact)]).norm()


TINY = ("--layers", 3, "--init-channels", 2, "--batch-size", 360, "--workers", 0)
SEARCH = (*TINY, "--nodes", 2, "--eigenvalue-images", 0, "--runs-path")


def run_main(main, *words, **options):
    """Run a script in this process, with what a user's script passes to its main."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script.py", *map(str, words)])
        main(**options)


@pytest.mark.long
@pytest.mark.parametrize("name", [*EXAMPLES, "adam"])
def test_an_example_searches(name, tmp_path):
    space = ("--primitives", ",".join(NEW_SPACE)) if name == "new_operation" else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["example.py", *map(str, (*SEARCH, tmp_path, "--epochs", 1, *space))])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    (epoch,) = json.loads((tmp_path / "search/digits/history.json").read_text())
    assert from_str(epoch["string"])


@pytest.mark.long
def test_a_selection_gets_the_trained_network_and_its_genotype_is_the_searchs_result(tmp_path):
    select = arguments_of("select_by_removal")["select"]
    networks = []

    def watched(net, w_loader, alpha_loader):
        before = [alpha.clone() for alpha in net.alphas()]
        networks.append(select(net, w_loader, alpha_loader))
        assert all(torch.equal(alpha, old) for alpha, old in zip(net.alphas(), before))
        return networks[-1]

    run_main(search.main, *SEARCH, tmp_path, "--epochs", 2, select=watched)
    run = tmp_path / "search/digits"
    last = json.loads((run / "genotype.json").read_text())["last"]["string"]
    assert json.loads((run / "summary.json").read_text())["genotype"] == last == str(networks[0])
    history = json.loads((run / "history.json").read_text())
    assert from_str(last) != from_str(history[-1]["string"])  # the strongest operations


@pytest.mark.long
def test_a_logger_gets_what_tensorboard_gets(tmp_path):
    (csv_logger,) = arguments_of("csv_logger")["loggers"]
    run_main(search.main, *SEARCH, tmp_path, "--epochs", 1, loggers=[csv_logger])
    run = tmp_path / "search/digits"
    rows = [line.split(",") for line in (run / "scalars.csv").read_text().splitlines()]
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
    in_tensorboard = {
        (tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    }
    assert {(tag, int(step), float(np.float32(value))) for step, tag, value in rows} == in_tensorboard
    assert {"step/loss", "train/loss", "valid/top1", "lr/w", "step/alpha_loss"} <= {tag for _, tag, _ in rows}


@pytest.mark.long
def test_the_hosted_logger_of_the_docs_logs_to_the_service(tmp_path, monkeypatch):
    code = re.search(r"```python\n(class HostedLogger.*?)```", (ROOT / "docs/changing.md").read_text(), re.S)[1]
    started, logged = [], []
    service = SimpleNamespace(log=lambda values, step=None: logged.append((values, step)), finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **options: started.append(options) or service, Image=np.shape)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "hosted.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "hosted.py"), {"Logger": Logger})
    words = (*TINY, "--epochs", 1, "--genotype", "DARTS_V1", "--runs-path", tmp_path)
    run_main(augment.main, *words, loggers=[names["HostedLogger"]])
    assert started[0]["config"]["layers"] == 3
    assert {"step/loss", "test/top1"} <= {tag for values, _ in logged for tag in values}


def test_mixup_mixes_images_and_targets_alike():
    mixup = arguments_of("mixup")["augment_batch"]
    np.random.seed(0)
    X, y = batch(n=4)
    inputs, targets = mixup(X, y, 3)
    assert torch.allclose(targets.sum(1), torch.ones(4, dtype=X.dtype))
    np.random.seed(0)
    share = np.random.beta(0.2, 0.2)
    torch.testing.assert_close(inputs[1], share * X[1] + (1 - share) * X[2])
    torch.testing.assert_close(targets[1], (share * F.one_hot(y, 3)[1] + (1 - share) * F.one_hot(y, 3)[2]).double())


@pytest.mark.long
def test_a_mixed_batch_is_what_augment_trains_on(tmp_path, monkeypatch):
    """The objective is that of the mixed images and targets; accuracy is counted by the labels."""
    monkeypatch.chdir(tmp_path)
    config, X, y = AugmentConfig(["--genotype", "DARTS_V2", "--device", "cpu", "--lr", "0.1"]), *batch(n=8)

    def weights_after(augment_batch, batches):
        torch.manual_seed(0)
        net = AugmentCNN(8, 1, 2, 3, 3, True, DARTS_V2).double()
        optim = torch.optim.SGD(net.parameters(), config.lr)
        augment.train(1, Run(config), net, Batches(batches), optim, augment_batch, 3)
        return list(net.parameters())

    def negative(X, y, n_classes):
        return -X, F.one_hot(y, n_classes).to(X.dtype)

    mixed, expected = weights_after(negative, [(X, y)]), weights_after(augment.unchanged, [(-X, y)])
    for w, other in zip(mixed, expected):
        torch.testing.assert_close(w, other, rtol=1e-12, atol=1e-14)
