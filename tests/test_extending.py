"""The small researches of examples/, which docs/changing.md shows: each has its effect, under both executions."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Batches, batch, run_script, sgd, small_net
from exact import hessian_product
from torch import nn

import search
from architect import Architect
from config import SearchConfig
from genotypes import parse
from models.choices import EXECUTIONS, PRIMITIVES
from models.fast import search_cell
from models.ops import OPS, FactorizedReduce, MixedOp, SepConv
from models.search_cnn import SearchCNN
from run.run import Run
from utils import cosine_lr

EXAMPLES = ["sigmoid", "gumbel", "l1_penalty", "half_channels", "new_operation"]
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
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "main", lambda **options: arguments.update(options))
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return arguments.get("network", SearchCNN), arguments.get("architect", Architect)


def network(kind, execution, primitives=PRIMITIVES, C=4):
    torch.manual_seed(0)
    net = kind(1, C, 3, 3, nn.CrossEntropyLoss(), n_nodes=2, execution=execution, primitives=primitives)
    return net.double().to(memory_format=torch.channels_last)


def two_steps(net, architect=Architect):
    """Two steps of the search by the script's own loop; the alphas' gradients of the last."""
    trn, val = (Batches(batch(n=8, seed=seed + i) for i in range(2)) for seed in (10, 50))
    config = SearchConfig(["--w-lr", "0.1", "--alpha-lr", "0.01", "--device", "cpu", "--overwrite"])
    w_optim = torch.optim.SGD(net.weights(), config.w_lr, momentum=0.9, weight_decay=3e-4)
    alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    bilevel = architect(net, 0.9, 3e-4)
    search.train(1, Run(config), net, bilevel, trn, val, w_optim, alpha_optim, cosine_lr(w_optim, 50))
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
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_a_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--epochs", 1, "--batch-size", 360, "--layers", 3, "--init-channels", 4, "--nodes", 2]
    if name == "new_operation":
        words += ["--primitives", ",".join(NEW_SPACE)]
    done = run_script(f"examples/{name}.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "genotype = Genotype(" in done.stdout
    assert ("run by their own forward" in done.stdout) == (name == "half_channels")


@both_executions
def test_sigmoid_weights_do_not_compete(execution):
    kind, _ = classes_of("sigmoid")
    net = network(kind, execution)
    for kind_of_cell, alphas in (("normal", net.alpha_normal), ("reduce", net.alpha_reduce)):
        assert all(torch.equal(w, torch.sigmoid(a)) for w, a in zip(net.edge_weights()[kind_of_cell], alphas))
    with torch.no_grad():  # raising all others takes nothing from an operation's weight, and its edge stays the first
        net.alpha_normal[0][0] = torch.tensor([3.0, 2.9, 2.9, 2.9, 2.9, 2.9, 2.9, 2.9])
        net.alpha_normal[0][1, 1] = 2.95
    assert net.genotype().normal[0] == [("max_pool_3x3", 0), ("avg_pool_3x3", 1)]
    softmax = network(SearchCNN, execution)
    softmax.load_state_dict(net.state_dict())
    assert softmax.genotype().normal[0] == [("avg_pool_3x3", 1), ("max_pool_3x3", 0)]
    before = [alpha.detach().clone() for alpha in net.alphas()]
    two_steps(net)
    assert all((alpha != old).any() for alpha, old in zip(net.alphas(), before))


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


@both_executions
def test_an_edge_that_is_replaced_by_any_module_runs(execution):
    class Passed(nn.Module):
        def forward(self, x, weights):
            return x * weights.sum()

    net = network(SearchCNN, execution, ["skip_connect"])
    for cell, reduction in zip(net.cells, net.reductions):
        for node in cell.dag:
            for j in range(len(node)):
                if not (reduction and j < 2):
                    node[j] = Passed()
    loss = net.loss(*batch())
    loss.backward()
    other = network(SearchCNN, execution, ["skip_connect"])
    torch.testing.assert_close(loss, other.loss(*batch()))  # weights of one candidate are 1: the same network


# Found by trying to break it: each ran under one execution as it should, and under the other as if it were not there.


def every(net, kind):
    return [module for module in net.modules() if type(module) is kind]


def give_bn_a_bias_alone(net):
    for bn in (bn for bn in every(net, nn.BatchNorm2d) if bn.weight is None):
        bn.bias = nn.Parameter(torch.randn(bn.num_features, dtype=torch.float64))


def let_activations_work_in_place(net):
    for op in every(net, SepConv):
        op[1][0] = nn.ReLU(inplace=True)


def average_statistics_over_all_batches(net):
    for bn in every(net, nn.BatchNorm2d):
        bn.momentum = None


def give_each_bn_a_momentum(net):
    for i, bn in enumerate(every(net, nn.BatchNorm2d)):
        bn.momentum = 0.1 + 0.01 * (i % 5)


def normalise_weights_of_reductions(net):
    for op in every(net, FactorizedReduce):
        for conv in (op.conv1, op.conv2):
            nn.utils.weight_norm(conv).weight_g.data.mul_(2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [None, "BATCHED"])
@pytest.mark.parametrize(
    "change",
    [
        give_bn_a_bias_alone,
        let_activations_work_in_place,
        average_statistics_over_all_batches,
        give_each_bn_a_momentum,
        normalise_weights_of_reductions,
    ],
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


@both_executions
def test_hooks_on_the_convolutions_of_a_factorized_reduction_are_called(execution):
    net, called = network(SearchCNN, execution), []
    op = every(net, FactorizedReduce)[0]
    for conv in (op.conv1, op.conv2):
        conv.register_forward_hook(lambda conv, inputs, output: called.append(conv))
    net(batch()[0])
    assert called == [op.conv1, op.conv2]


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
    [
        lambda w: F.one_hot(w.argmax(-1), w.shape[-1]),
        lambda w: w.float(),
        lambda w: w > 0.1,
        lambda w: w[..., None, None],
        lambda w: w[..., None, None, None, None] * torch.linspace(0, 1, 6).double().view(6, 1, 1, 1),
    ],
    ids=["one-hot integers", "float32", "bool", "of more dimensions", "by image"],
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
        ("none", "skip_connect", "sep_conv_3x3"),
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


@pytest.mark.parametrize(
    "primitives", [(), ("none",), ("skip_connect", "skip_connect"), ("skip_connect", "sep_conv_9x9")]
)
def test_spaces_that_cannot_be_searched_are_refused(primitives):
    with pytest.raises(ValueError, match=r"primitives|unknown"):
        network(SearchCNN, "plain", primitives)


def test_parse_ranks_the_strongest_candidate_other_than_none_wherever_none_stands():
    weights = [torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])]
    assert parse(weights, 2, ("none", "skip_connect", "sep_conv_3x3")) == [[("sep_conv_3x3", 1), ("skip_connect", 0)]]
    assert parse(weights, 1, ("skip_connect", "none", "sep_conv_3x3")) == [[("sep_conv_3x3", 1)]]
    assert parse(weights, 2, ("skip_connect", "sep_conv_3x3", "max_pool_3x3")) == [
        [("max_pool_3x3", 1), ("skip_connect", 0)]
    ]
