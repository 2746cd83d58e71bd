"""Search spaces: NAS-Bench-201 against its definition and its table, and a space that the program does not know."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, sgd, small_net
from exact import hessian_product
from short_runs import command, refused
from test_architect import exact_alpha_gradient, relative_error
from toy_space import Toy

import augment
import cost
import genotypes
import protocol
import search
import visualize
from architect import Architect
from config import AugmentConfig, SearchConfig
from evidence.perturbation import accuracy, select_by_perturbation
from genotypes import GenotypeError, from_str, random_genotypes, resolve
from models.augment_cnn import AugmentCNN
from models.nas_bench_201_cells import ResidualBlock
from models.spaces import SPACES, nas_bench_201, space_of
from run.checkpoints import load_checkpoint
from run.folder import RunFolder, read_json
from variants import VARIANTS

NB201 = SPACES["nas-bench-201"]
CONVS = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
SMALL = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
RUN = ["--init-channels", "2", "--layers", "1", "--batch-size", "64", "--workers", "0", "--epochs", "2"]


def net_201(**changes):
    options = {"C": 4, "n_layers": 1, "n_nodes": 3, "primitives": NB201.primitives, "space": NB201}
    return small_net(**options | changes)


# NAS-Bench-201


@pytest.mark.parametrize(("genotype", "n"), [(SMALL, 129_306), (CONVS, 1_531_546)])
def test_networks_have_the_published_numbers_of_parameters(genotype, n):
    net = AugmentCNN(32, 3, 16, 10, 5, False, from_str(genotype))
    assert sum(parameter.numel() for parameter in net.parameters()) == n


@pytest.mark.parametrize(
    ("operations", "published"),
    [
        # the best of each data set and all skip connections, as the papers give them
        ("333132", {"cifar10": 94.37, "rank": 1}),
        ("333133", {"cifar100": 73.51}),
        ("223133", {"imagenet16_120": 47.31}),
        ("111111", {"cifar10": 54.30, "cifar100": 15.61, "imagenet16_120": 16.32}),
    ],
)
def test_the_table_has_the_published_accuracies(operations, published):
    digits = iter(map(int, operations))
    cell = [[(NB201.primitives[next(digits)], source) for source in range(i + 1)] for i in range(3)]
    truth = NB201.truth(nas_bench_201.Cell(cell))
    assert truth.items() >= published.items()
    others = [row[0] for row in nas_bench_201.accuracies().values()]
    assert len(others) == truth["of"] == 5**6
    assert truth["rank"] == 1 + sum(other > truth["cifar10"] for other in others)


def test_chance_is_what_is_known_of_it():
    values = [row[0] for row in nas_bench_201.accuracies().values()]
    marks = NB201.truth_marks()
    assert (round(sum(values) / len(values), 2), marks["cifar10"]["median"]) == (87.06, 90.74)
    assert marks["cifar10"]["best hundredth"] == 93.78
    assert [marks[name]["best"] for name in marks] == [94.37, 73.51, 47.31]


def test_a_search_network_with_one_hot_weights_is_the_network_of_its_genotype():
    cell = NB201.random(random.Random(3), 3, NB201.primitives)
    net = net_201().train()
    hot = [torch.zeros_like(alpha) for alpha in net.alpha_cell]
    for weights, node in zip(hot, cell.cell):
        for op, source in node:
            weights[source, net.primitives.index(op)] = 1
    net.edge_weights = lambda noise=None: {"cell": hot}
    other = AugmentCNN(8, 1, 4, 3, 1, False, cell).double().train()
    tensors = net.state_dict()
    for place, tensor in other.state_dict().items():
        layer, in_cell, rest = place.partition(".dag.")
        name = place
        if in_cell:
            node, source, end = rest.split(".", 2)
            column = net.primitives.index(cell.cell[int(node)][int(source)][0])
            name = f"{layer}.dag.{node}.{source}._ops.{column}.{end}"
        if name in tensors:  # the affine parameters of the cells' BN, 1 and 0, have no counterpart
            tensor.copy_(tensors[name])
    X, _ = batch(size=9)
    torch.testing.assert_close(net(X), other(X)[0], rtol=0, atol=1e-12)
    assert NB201.genotype({"cell": hot}, 2, net.primitives) == cell


def test_alphas_gradient_is_exact_in_this_space():
    net, trn, val = net_201(smooth=True), batch(seed=1), batch(seed=2)
    optim = sgd(net, steps=1)
    exact = exact_alpha_gradient(net, trn, val, 0.1, optim)
    architect = Architect(net, 0.9, 3e-4, eps_scale=1e-5)
    architect.unrolled_backward(*trn, *val, 0.1, optim)
    assert relative_error([alpha.grad for alpha in net.alphas()], exact) < 1e-6
    d = [torch.randn_like(w) for w in net.weights()]
    assert relative_error(architect.compute_hessian(d, *trn), hessian_product(net, d, trn)) < 1e-6


@pytest.mark.parametrize("size", [8, 9])
def test_a_residual_block_rounds_odd_sizes_up(size):
    assert ResidualBlock(3, 6)(torch.randn(2, 3, size, size)).shape == (2, 6, 4 + size % 2, 4 + size % 2)


@pytest.mark.parametrize(
    "text",
    ["|none~0|", CONVS[:-1], CONVS.replace("~2", "~1"), CONVS.replace("nor_conv_3x3~2", "sep_conv_3x3~2"), "||+||+||"],
)
def test_a_malformed_cell_is_refused(text):
    with pytest.raises(GenotypeError, match=r"^genotype: "):
        from_str(text)


def test_random_cells_have_every_operation_on_every_edge():
    cells = random_genotypes(2000, 0, NB201)
    for i in range(3):
        for source in range(i + 1):
            counts = Counter(cell.cell[i][source][0] for cell in cells)
            assert counts.keys() == set(NB201.primitives)
            assert all(abs(n - 400) < 5 * 18 for n in counts.values())  # a standard deviation is 17.9


def test_the_recipe_of_the_benchmark_is_the_default_for_its_cells():
    options = AugmentConfig(["--genotype", CONVS, "--epochs", "12"])
    assert (options.epochs, options.batch_size, options.lr, options.nesterov) == (12, 256, 0.1, True)
    assert (options.weight_decay, options.aux_weight, options.cutout_length, options.lr_decay) == (5e-4, 0, 0, None)
    assert not AugmentConfig(["--genotype", "DARTS_V2"]).nesterov


def test_scripts_take_such_cells(capsys, tmp_path):
    assert command(genotypes.main, [SMALL]) == 0
    assert "cifar10 85.86 %" in capsys.readouterr().out
    assert command(cost.main, [SMALL, "DARTS_V2", "--rounds", "0"]) == 0
    assert "0.129" in capsys.readouterr().out
    assert command(visualize.main, [SMALL, "--output", tmp_path / "x"]) == 0
    assert "x-cell" in capsys.readouterr().out
    refused(capsys, augment.main, ["--genotype", SMALL, "--aux-weight", "0.4"], "--aux-weight has no effect")
    refused(capsys, search.main, ["--space", "nas-bench-201", "--nodes", "2"], "--nodes has no effect")
    fair = ["--space", "nas-bench-201", "--variant", "fair-darts", "--runs-path", tmp_path]
    refused(capsys, search.main, fair, "fair-darts needs edges to choose")


# Searches in any space


def searched(short_runs, path, space, *words):
    """The folder of a short search."""
    assert command(search.main, ["--space", space, *RUN, "--runs-path", path, *words]) == 0
    return RunFolder(path / "search" / "digits")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SPACES, "toy", Toy())


def test_a_space_that_is_not_known_is_searched_resumed_trained_and_reported(toy, short_runs, tmp_path, capsys):
    folder = searched(
        short_runs,
        tmp_path,
        "toy",
        "--epochs",
        "1",
        "--variant",
        "pc-darts,drnas",
        "--pc-warm-up",
        "0",
        "--pc-share",
        "2",
    )
    assert command(search.main, ["--resume", folder.path, "--epochs", "2"]) == 0
    genotype = from_str(read_json(folder.summary)["genotype"])
    assert space_of(genotype) is SPACES["toy"]
    assert command(augment.main, ["--genotype", folder.path, *RUN, "--runs-path", tmp_path]) == 0
    assert command(visualize.main, [folder.path]) == 0
    assert command(visualize.main, [tmp_path / "augment" / "digits"]) == 0
    page = (folder.path / "report.html").read_text()
    assert "odd cell" in page
    assert "How good the cell is" not in page
    refused(capsys, search.main, ["--resume", folder.path, "--space", "darts"], "--space is fixed")


def states_of(folder):
    checkpoint = load_checkpoint(folder.checkpoint)
    return [tensor for _, tensor in sorted(checkpoint["parts"]["net"].items())]


def test_without_the_table_a_search_ends_with_the_same_bits(short_runs, tmp_path, monkeypatch):
    known = searched(short_runs, tmp_path / "known", "nas-bench-201")
    with monkeypatch.context() as patch:
        patch.setattr(nas_bench_201, "TABLE", tmp_path / "missing")
        nas_bench_201.accuracies.cache_clear()
        nas_bench_201.in_order.cache_clear()
        unknown = searched(short_runs, tmp_path / "unknown", "nas-bench-201")
    nas_bench_201.accuracies.cache_clear()
    nas_bench_201.in_order.cache_clear()
    for a, b in zip(states_of(known), states_of(unknown), strict=True):
        assert torch.equal(a, b)
    with_truth, without = read_json(known.summary), read_json(unknown.summary)
    assert with_truth["published_rank"] == read_json(known.history)[-1]["truth"]["rank"]
    assert with_truth["genotype"] == without["genotype"]
    assert "published_rank" not in without


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "fair-darts"])
def test_every_variant_searches_nas_bench_201(variant, short_runs, tmp_path):
    words = ["--init-channels", "4", "--variant", variant, "--eigenvalue-images", "1"]
    words += ["--pc-warm-up", "0"] * (variant == "pc-darts") + ["--gdas-zeros", "on"] * (variant == "gdas")
    folder = searched(short_runs, tmp_path, "nas-bench-201", *words)
    assert read_json(folder.summary)["published_of"] == 15625


@pytest.mark.process
def test_a_protocol_needs_no_trainings_where_accuracies_are_published(short_runs, tmp_path):
    quoted = "--space nas-bench-201 --layers 1 --init-channels 2 --epochs 1 --order first"
    words = ["--runs-path", tmp_path, "--searches", "1", "--random", "2", "--workers", "0", "--search", quoted]
    assert command(protocol.main, words) == 0
    folder = tmp_path / "protocol" / "digits"
    members = read_json(folder / "results.json")["members"]
    assert [member["truth"]["of"] for member in members] == [15625] * 3
    assert members[0]["search"]["history"][0]["string"] == members[0]["genotype"]
    assert "in the best hundredth" in (folder / "report.html").read_text()
    assert not (folder / "augment").exists()


# Selection by perturbation


class WholeBatches(list):
    def epoch(self, epoch, first=0):
        yield from ((X, y, len(y)) for X, y in self)


@pytest.mark.parametrize("in_darts", [False, True])
def test_selection_by_perturbation_is_its_definition(in_darts):
    """Each edge keeps the candidate without which fewest images are right, the decisions before it in force."""
    candidates = ["none", "skip_connect", "max_pool_3x3", "sep_conv_3x3"]
    net = (small_net(primitives=candidates) if in_darts else net_201()).eval()
    loader = WholeBatches([batch(n=60, seed=seed) for seed in range(2)])
    weights = {kind: [node.detach().clone() for node in nodes] for kind, nodes in net.edge_weights().items()}
    columns = [i for i, name in enumerate(net.primitives) if not (in_darts and name == "none")]
    places = [(kind, i, s) for kind, nodes in weights.items() for i, node in enumerate(nodes) for s in range(len(node))]
    tuned = []
    found = select_by_perturbation(net, loader, lambda: tuned.append(1), seed=5, n_edges=2)
    del net.edge_weights

    def top1(kind, i, row, values):
        kept, weights[kind][i][row] = weights[kind][i][row].clone(), values
        net.edge_weights = lambda noise=None: weights
        right = accuracy(net, loader)
        weights[kind][i][row] = kept
        return right

    generator = random.Random(5)
    generator.shuffle(places)
    nodes = [(kind, i) for kind in weights for i, node in enumerate(weights[kind]) if len(node) > 2]
    generator.shuffle(nodes)
    ops = {}
    for kind, i, s in places:
        without = {}
        for column in columns:
            values = weights[kind][i][s].clone()
            values[column] = 0
            without[column] = top1(kind, i, s, values)
        best = min(columns, key=lambda column: (without[column], net.primitives[column] == "none"))
        ops[kind, i, s] = net.primitives[best]
        weights[kind][i][s] = torch.eye(len(net.primitives), dtype=torch.float64)[best]
    edges = {(kind, i): list(range(len(node))) for kind in weights for i, node in enumerate(weights[kind])}
    for kind, i in nodes if in_darts else ():
        without = {s: top1(kind, i, s, torch.zeros(len(net.primitives), dtype=torch.float64)) for s in edges[kind, i]}
        edges[kind, i] = sorted(without, key=without.get)[:2]
        for s in without.keys() - set(edges[kind, i]):
            weights[kind][i][s] = 0
    for (kind, i), kept in edges.items():
        expected = [(ops[kind, i, s], s) for s in kept]
        node = getattr(found, kind)[i]
        assert sorted(node) == sorted(expected)
    assert len(tuned) == len(places) - 1 + (len(nodes) if in_darts else 0)


@pytest.mark.parametrize("alpha_lr", ["0.001", "0"])
def test_a_search_selects_by_perturbation_and_repeats_the_selection(alpha_lr, short_runs, tmp_path):
    words = ["--select", "perturbation", "--tune-epochs", "1", "--eigenvalue-images", "0", "--alpha-lr", alpha_lr]
    first = searched(short_runs, tmp_path, "nas-bench-201", *words)
    genotype, history = read_json(first.summary)["genotype"], read_json(first.history)
    assert str(resolve(str(first.log))) == genotype  # not the last that alphas gave
    assert (history[0]["margins"] == history[1]["margins"]) == (alpha_lr == "0")
    assert command(search.main, ["--resume", first.path]) == 0  # as after a kill in the selection
    assert read_json(first.summary)["genotype"] == genotype


def test_between_two_decisions_w_takes_clipped_steps_with_a_draw_each():
    config = SearchConfig(["--select", "perturbation", "--tune-epochs", "2", "--w-grad-clip", "0.001"])
    run = SimpleNamespace(config=config, device=torch.device("cpu"), stop_if_asked=lambda: None)
    net, draws = net_201(), []
    net.draw_noise = lambda: draws.append(1)
    before, alphas = [w.detach().clone() for w in net.weights()], [alpha.detach().clone() for alpha in net.alphas()]
    optim = torch.optim.SGD(net.weights(), 0.5)
    search.tune_weights(run, net, Architect(net, 0.9, 0), WholeBatches([batch(seed=1), batch(seed=2)]), optim)
    length = torch.cat([(w - b).flatten() for w, b in zip(net.weights(), before)]).norm()
    assert len(draws) == 4
    assert 0 < length <= 4 * 0.5 * 0.001 * (1 + 1e-6)
    assert all(map(torch.equal, net.alphas(), alphas))
