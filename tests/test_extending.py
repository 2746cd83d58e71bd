"""The small researches of examples/, which docs/changing.md shows: each has its effect, under both executions."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Batches, batch, run_script, sgd, small_net
from exact import by_definition, hessian_product
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import augment
import search
from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2, from_str, parse
from models.augment_cnn import AugmentCNN
from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import OPS, FactorizedReduce, MixedOp
from models.search_cnn import SearchCNN
from run.loggers import Logger
from run.run import Run
from utils import cosine_lr

EXAMPLES = ["sigmoid", "gumbel", "l1_penalty", "half_channels", "new_operation", "w_penalty"]
NEW_SPACE = ("none", "skip_connect", "sep_conv_3x3", "max_pool_5x5")


@pytest.fixture(autouse=True)
def operations_of_examples_are_forgotten():
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


both_executions = pytest.mark.parametrize("execution", EXECUTIONS)


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


def two_steps(net, architect=Architect):
    """Two steps of the search by the script's own loop; the alphas' gradients of the last."""
    trn, val = (Batches(batch(n=8, seed=seed + i) for i in range(2)) for seed in (10, 50))
    config = SearchConfig(["--w-lr", "0.1", "--alpha-lr", "0.01", "--device", "cpu", "--overwrite"])
    w_optim = architect.w_optimizer(net.weights(), config)
    alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    search.train(1, Run(config), net, architect(net, 0.9, 3e-4), trn, val, w_optim, alpha_optim, cosine_lr(w_optim, 50))
    return [alpha.grad.clone() for alpha in net.alphas()]


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_both_executions_of_an_example_are_the_same_search(name):
    kind, architect = classes_of(name)
    primitives = NEW_SPACE if name == "new_operation" else PRIMITIVES
    states = {}
    for execution in EXECUTIONS:
        net = network(kind, execution, primitives)
        torch.manual_seed(1)
        two_steps(net, architect)
        states[execution] = dict(net.named_parameters()) | {"logits": net.eval()(batch()[0])}
    for key, value in states["plain"].items():
        # eq. 7 divides rounding by eps; ReLUs and maxima can take another branch for it, which the seed avoids
        torch.testing.assert_close(states["fused"][key], value, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.process
@pytest.mark.parametrize("name", [*EXAMPLES, "adam", "select_by_removal", "csv_logger"])
def test_an_example_runs_as_a_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--epochs", 1, "--batch-size", 360, "--layers", 3, "--init-channels", 4, "--nodes", 2]
    if name == "new_operation":
        words += ["--primitives", ",".join(NEW_SPACE)]
    done = run_script(f"examples/{name}.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "genotype = Genotype(" in done.stdout
    assert ("run by their own forward" in done.stdout) == (name == "half_channels")


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


@pytest.mark.long
@both_executions
def test_noise_drawn_in_every_pass_would_spoil_eq_7(execution):
    """The fault that `SearchCNN.noise` prevents: the difference of two draws, divided by 2 eps."""
    kind, _ = classes_of("gumbel")
    net, trn = small_net(smooth=True, execution=execution), batch(seed=1)
    net.__class__ = kind
    net.noise = net.draw_noise()
    d = [torch.randn_like(w) for w in net.weights()]
    exact = torch.cat([h.flatten() for h in hessian_product(net, d, trn)])

    def error_of_eq_7():
        hessian = Architect(net, 0.9, 3e-4, eps_scale=1e-4).compute_hessian(d, *trn)
        return (torch.cat([h.flatten() for h in hessian]) - exact).norm() / exact.norm()

    assert error_of_eq_7() < 1e-4

    class DrawnInEveryPass(kind):
        def edge_weights(self, noise=None):
            return super().edge_weights(self.draw_noise())

    net.__class__ = DrawnInEveryPass
    assert error_of_eq_7() > 1


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
    monkeypatch.setattr(search_cell, "_classes_in_log", set())
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


@both_executions
def test_a_subset_with_a_new_operation_is_what_is_searched(execution):
    classes_of("new_operation")
    net = network(SearchCNN, execution, NEW_SPACE)
    assert {tuple(alpha.shape) for alpha in net.alphas()} == {(2, 4), (3, 4)}
    two_steps(net)
    with torch.no_grad():
        net.alpha_normal[1][:, NEW_SPACE.index("max_pool_5x5")] += 1
        net.alpha_reduce[0][:, NEW_SPACE.index("none")] += 1
    genotype = net.genotype()
    assert {op for op, _ in genotype.normal[1]} == {"max_pool_5x5"}
    assert {op for node in genotype.reduce for op, _ in node} <= set(NEW_SPACE) - {"none"}


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
    logits, loss = search.w_backward(X, y, net, architect, weights, torch.autocast("cpu", enabled=False))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(F.cross_entropy(logits, y, label_smoothing=0.3), expected)
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


def run_main(main, *words, **options):
    """Run a script in this process, with what a user's script passes to its main."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script.py", *map(str, words)])
        main(**options)


TINY = ("--layers", 3, "--init-channels", 2, "--batch-size", 360, "--workers", 0, "--epochs", 2)


@pytest.mark.long
def test_a_selection_gets_the_trained_network_and_its_genotype_is_the_searchs_result(tmp_path):
    select = arguments_of("select_by_removal")["select"]
    networks = []

    def watched(net, w_loader, alpha_loader):
        before = [alpha.clone() for alpha in net.alphas()]
        networks.append(select(net, w_loader, alpha_loader))
        assert all(torch.equal(alpha, old) for alpha, old in zip(net.alphas(), before))
        assert len(w_loader) == len(alpha_loader) == 2
        return networks[-1]

    run_main(search.main, *TINY, "--nodes", 2, "--eigenvalue-images", 0, "--runs-path", tmp_path, select=watched)
    run = tmp_path / "search/digits"
    last = json.loads((run / "genotype.json").read_text())["last"]["string"]
    assert json.loads((run / "summary.json").read_text())["genotype"] == last == str(networks[0])
    history = json.loads((run / "history.json").read_text())
    assert from_str(last) != from_str(history[-1]["string"])  # the strongest operations


@pytest.mark.long
def test_a_logger_gets_what_tensorboard_gets(tmp_path):
    (csv_logger,) = arguments_of("csv_logger")["loggers"]
    words = (*TINY, "--nodes", 2, "--eigenvalue-images", 0, "--runs-path", tmp_path)
    run_main(search.main, *words, loggers=[csv_logger])
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
    names = {"Logger": Logger}
    exec(code, names)
    run_main(augment.main, *TINY, "--genotype", "DARTS_V1", "--runs-path", tmp_path, loggers=[names["HostedLogger"]])
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


# What is overridden runs, in whatever way.


def double(edge, x, weights):
    return 2 * MixedOp.forward(edge, x, weights)


class Doubled(MixedOp):
    def forward(self, x, weights):
        return double(self, x, weights)


def subclassed(edge):
    edge.__class__ = Doubled


def hooked(edge):
    edge.register_forward_hook(lambda module, inputs, output: 2 * output)


def patched(edge):
    edge.forward = lambda x, weights: double(edge, x, weights)


@pytest.mark.long
@pytest.mark.parametrize("layout", [None, "BATCHED"])
@pytest.mark.parametrize("change", [subclassed, hooked, patched])
@pytest.mark.parametrize("places", [[(0, 0)], [(1, 2)], [(0, 1), (1, 0)], "all"])
def test_an_edge_that_is_overridden_runs_under_both_executions(change, places, layout, monkeypatch):
    if layout:
        monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, layout))
    outputs = {}
    for execution in EXECUTIONS:
        net = network(SearchCNN, execution)
        unchanged = net(batch()[0])
        for cell in net.cells:
            for i, node in enumerate(cell.dag):
                for j, edge in enumerate(node):
                    if places == "all" or (i, j) in places:
                        change(edge)
        outputs[execution] = net(batch()[0])
        assert not torch.allclose(outputs[execution], unchanged, rtol=1e-3)
    torch.testing.assert_close(outputs["fused"], outputs["plain"], rtol=1e-9, atol=1e-11)


# Found by trying to break it: each ran under one execution as it should, and under the other as if it were not there.


def every(net, kind):
    return [module for module in net.modules() if type(module) is kind]


def give_bn_a_bias_alone(net):
    for bn in (bn for bn in every(net, nn.BatchNorm2d) if bn.weight is None):
        bn.bias = nn.Parameter(torch.randn(bn.num_features, dtype=torch.float64))


def average_statistics_over_all_batches(net):
    for bn in every(net, nn.BatchNorm2d):
        bn.momentum = None


def normalise_weights_of_reductions(net):
    for op in every(net, FactorizedReduce):
        for conv in (op.conv1, op.conv2):
            nn.utils.weight_norm(conv).weight_g.data.mul_(2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [None, "BATCHED"])
@pytest.mark.parametrize(
    "change", [give_bn_a_bias_alone, average_statistics_over_all_batches, normalise_weights_of_reductions]
)
def test_changed_parts_of_operations_run_under_both_executions(change, layout, recompute, monkeypatch):
    if layout:
        monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, layout))
    values = {}
    for execution in EXECUTIONS:
        net = network(SearchCNN, execution)
        net.recompute = recompute and execution == "fused"
        torch.manual_seed(1)
        change(net)
        loss = net.loss(*batch())
        loss.backward()
        gradients = {f"d {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        values[execution] = {"loss": loss} | gradients | dict(net.named_buffers())
    for name, value in values["plain"].items():
        torch.testing.assert_close(values["fused"][name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_an_operation_counts_in_a_buffer_is_counted_once(recompute, monkeypatch):
    class Counting(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = stride
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return x[:, :, :: self.stride, :: self.stride]

    monkeypatch.setitem(OPS, "counting", lambda C, stride, affine: Counting(stride))
    net = network(SearchCNN, "fused", ["counting", "sep_conv_3x3"])
    net.recompute = recompute
    net.loss(*batch()).backward()
    assert {op.passes.item() for op in every(net, Counting)} == {1}


@pytest.mark.long
@pytest.mark.parametrize("layout", [None, "BATCHED"])
@pytest.mark.parametrize(
    "change",
    [lambda w: F.one_hot(w.argmax(-1), w.shape[-1]), lambda w: w.float(), lambda w: w[..., None, None]],
    ids=["one-hot integers", "float32", "of more dimensions"],
)
def test_weights_of_other_types_and_shapes_mean_the_same_under_both_executions(change, layout, monkeypatch):
    class Changed(SearchCNN):
        def edge_weights(self, noise=None):
            return {kind: [change(w) for w in ws] for kind, ws in super().edge_weights().items()}

    if layout:
        monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, layout))
    plain, fused = (network(Changed, execution)(batch()[0]) for execution in ("plain", "fused"))
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", [None, "BATCHED"])
def test_an_operation_that_does_not_keep_the_size_is_named(layout, monkeypatch):
    class Average(nn.Module):
        def forward(self, x):
            return x.mean((2, 3), keepdim=True)

    if layout:
        monkeypatch.setattr(search_cell, "layout_for", lambda x: getattr(search_cell, layout))
    monkeypatch.setitem(OPS, "average", lambda C, stride, affine: Average())
    with pytest.raises(ValueError, match=r"must keep images and channels.*made \(6, 4, 1, 1\): Average"):
        network(SearchCNN, "fused", ["average", "none"])(batch()[0])


@pytest.mark.long
@both_executions
def test_a_search_with_frozen_weights_leaves_them_and_moves_the_others(execution):
    net = network(SearchCNN, execution)
    net.stem.requires_grad_(False)
    before = {name: value.clone() for name, value in net.named_parameters()}
    two_steps(net)
    moved = {name for name, value in net.named_parameters() if (value != before[name]).any()}
    assert moved == {name for name in before if not name.startswith("stem")}


@both_executions
def test_weights_that_do_not_fit_the_candidates_are_refused(execution):
    class TooMany(SearchCNN):
        def edge_weights(self, noise=None):
            return {kind: [F.pad(w, (0, 1)) for w in ws] for kind, ws in super().edge_weights().items()}

    with pytest.raises(ValueError, match="zip"):
        network(TooMany, execution)(batch()[0])


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
@both_executions
@pytest.mark.parametrize(
    "primitives",
    [
        ("skip_connect", "sep_conv_3x3"),
        ("none", "max_pool_3x3"),
        ("dil_conv_5x5",),
        tuple(OPS),
        tuple(reversed(PRIMITIVES)),
    ],
    ids=lambda primitives: f"{len(primitives)} from {primitives[0]}",
)
def test_any_search_space_is_searched(primitives, execution, recompute):
    net = network(SearchCNN, execution, primitives)
    net.recompute = recompute
    gradients = two_steps(net)
    assert all(gradient.shape[1] == len(primitives) and gradient.isfinite().all() for gradient in gradients)
    genotype = net.genotype(k=1)
    assert {len(node) for node in genotype.normal} == {1}
    assert {op for node in genotype.normal for op, _ in node} <= set(primitives) - {"none"}


def test_parse_ranks_the_strongest_candidate_other_than_none_wherever_none_stands():
    weights = [torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])]
    assert parse(weights, 2, ("none", "skip_connect", "sep_conv_3x3")) == [[("sep_conv_3x3", 1), ("skip_connect", 0)]]
    assert parse(weights, 1, ("skip_connect", "none", "sep_conv_3x3")) == [[("sep_conv_3x3", 1)]]
    assert parse(weights, 2, ("skip_connect", "sep_conv_3x3", "max_pool_3x3")) == [
        [("max_pool_3x3", 1), ("skip_connect", 0)]
    ]
