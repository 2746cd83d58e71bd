"""Many ranks compute what one does: the steps of both stages. Each rank is a process."""

import functools
import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import Batches, batch, small_net
from torch import nn

import augment
import search
from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2, from_str
from machine import ranks
from models.augment_cnn import AugmentCNN
from models.fast import search_cell
from models.search_cnn import SearchCNN
from models.spaces import SPACES
from models.sync_bn import synchronise
from run.run import Run
from utils import cosine_lr
from variants import compose

# global batches: divisible, odd, and too small to give each of two, or of four, ranks two rows
SIZES = (8, 7, 9, 5, 3, 2)
# the normal cell does not use its first input, whose parameters get no gradient
UNUSED_INPUT = from_str(
    "Genotype(normal=[[('sep_conv_3x3', 1), ('skip_connect', 1)]], normal_concat=[2], "
    "reduce=[[('max_pool_3x3', 0), ('max_pool_3x3', 1)]], reduce_concat=[2])"
)
# of the fused execution
LAYOUTS = {"plain": None, "edge by edge": search_cell.EDGE_BY_EDGE, "batched": search_cell.BATCHED}


# What ranks do. Each function returns name -> tensor.


def searched(execution, sync_bn=True, variant=(), **changes):
    """State after some second-order steps, by the script's own loop. variant: the words of one."""
    trn, val = (Batches(batch(n=n, seed=seed + i) for i, n in enumerate(SIZES)) for seed in (10, 50))
    config = SearchConfig(["--w-lr", "0.1", "--alpha-lr", "0.01", "--device", "cpu", "--overwrite", *variant])
    kind, architect_kind = compose(config, SearchCNN, Architect)
    options = {"C": 4, "n_nodes": 1, "execution": "plain" if execution == "plain" else "fused"}
    net = small_net(kind=kind, **options | changes)
    net.begin_epoch(20, 50)
    if sync_bn:
        synchronise(net)
    config.sync_bn = sync_bn
    w_optim = torch.optim.SGD(net.weights(), config.w_lr, momentum=0.9, weight_decay=3e-4)
    alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    architect = architect_kind(net, 0.9, 3e-4)
    with mock.patch.object(search_cell, "layout_for", return_value=LAYOUTS[execution]):
        search.train(1, Run(config), net, architect, trn, val, w_optim, alpha_optim, cosine_lr(w_optim, 50))
    return state_of(net)


def augmented(sync_bn=True, genotype=DARTS_V2):
    """State after an epoch of augment, with drop path and the auxiliary head."""
    config = AugmentConfig(["--genotype", "DARTS_V2", "--lr", "0.1", "--device", "cpu", "--overwrite"])
    config.sync_bn = sync_bn
    torch.manual_seed(0)
    net = AugmentCNN(8, 1, 4, 3, 3, True, genotype).double().to(memory_format=torch.channels_last).train()
    net.drop_path_prob(0.3)
    if sync_bn:
        synchronise(net)
    optim = torch.optim.SGD(net.parameters(), config.lr, momentum=0.9, weight_decay=3e-4)
    batches = Batches(batch(n=n, seed=i) for i, n in enumerate(SIZES))
    augment.train(1, Run(config), net, batches, optim)
    return state_of(net) | {"random": torch.get_rng_state().double()}


def state_of(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items() if tensor.is_floating_point()}


class Parts(nn.Module):
    """A network whose loss is that of each part of the batch by itself, as ranks without --sync-bn see it."""

    def __init__(self, net, n):
        super().__init__()
        self.net, self.n, self.criterion = net, n, net.criterion
        self.weights, self.alphas = net.weights, net.alphas

    def loss(self, X, y):
        cuts = [len(y) * i // self.n for i in range(self.n + 1)]
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)] if len(y) >= 2 * self.n else [slice(None)]
        return sum(len(y[part]) / len(y) * self.net.loss(X[part], y[part]) for part in parts)


def alpha_gradient(n_parts=1, execution="fused", n=9):
    """The alphas' gradient of a second-order step, BN by each rank's part; with n_parts on one rank, the same there."""
    net = small_net(C=4, execution=execution).train()
    net = net if n_parts == 1 else Parts(net, n_parts)
    optim = torch.optim.SGD(net.weights(), 0.1, momentum=0.9)
    trn, val = ([tensor[ranks.rows(n)] for tensor in batch(n=n, seed=seed)] for seed in (1, 2))
    Architect(net, 0.9, 3e-4).unrolled_backward(*trn, *val, 0.1, optim)
    return {f"alpha{i}": alpha.grad for i, alpha in enumerate(net.alphas())}


def statistics(sync_bn=False, execution="fused"):
    """Running statistics after a step on 9 images."""
    net = small_net(execution=execution).train()
    if sync_bn:
        synchronise(net)
    X, y = (tensor[ranks.rows(9)] for tensor in batch(n=9))
    net(X)
    if not sync_bn:
        ranks.average_step(torch.zeros((), dtype=X.dtype), net, [], y, sync_bn)
    return state_of(net)


GLOBAL = {execution: functools.partial(searched, execution) for execution in LAYOUTS}
GLOBAL |= {
    "recompute": functools.partial(searched, "edge by edge", recompute=True),
    "pc-darts": functools.partial(searched, "edge by edge", variant=["--variant", "pc-darts,beta-darts"]),
    "darts-minus": functools.partial(searched, "edge by edge", variant=["--variant", "darts-minus"]),
    "fair-darts": functools.partial(searched, "edge by edge", variant=["--variant", "fair-darts"]),
    "gdas": functools.partial(searched, "edge by edge", variant=["--variant", "gdas"]),
    "snas": functools.partial(searched, "edge by edge", variant=["--variant", "snas"]),
    "drnas": functools.partial(searched, "edge by edge", variant=["--variant", "drnas", "--drnas-kl-strength", "0.1"]),
    "sdarts": functools.partial(searched, "edge by edge", variant=["--variant", "sdarts"]),
    "nas-bench-201": functools.partial(searched, "plain", n_nodes=3, n_layers=1, space=SPACES["nas-bench-201"]),
    "augment": augmented,
    "augment, an input unused": functools.partial(augmented, genotype=UNUSED_INPUT),
    "statistics": functools.partial(statistics, True),
    "statistics, plain": functools.partial(statistics, True, "plain"),
}
PER_RANK = {
    "alpha, fused": alpha_gradient,
    "alpha, plain": functools.partial(alpha_gradient, execution="plain"),
    "alpha, few": functools.partial(alpha_gradient, n=3),
    "own statistics": statistics,
    "own search": functools.partial(searched, "edge by edge", sync_bn=False),
    "own augment": functools.partial(augmented, sync_bn=False),
}
# to be left out where four ranks share two cores
SLOW = ("plain", "batched", "recompute", "fair-darts", "gdas", "snas", "sdarts", "own search", "own augment")


def everything(n):
    """All cases, on each of n ranks."""
    return {name: case() for name, case in (GLOBAL | PER_RANK).items() if n < 4 or name not in SLOW}


def work(rank, n, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=n)
    torch.save(everything(n), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function: number of ranks -> the results of `everything` on each, rank 0 first."""

    @functools.cache
    def by(n):
        if n == 1:
            return [everything(1)]
        folder = tmp_path_factory.mktemp("ranks")
        torch.multiprocessing.spawn(work, (n, folder), nprocs=n)
        return [torch.load(folder / f"{rank}.pt") for rank in range(n)]

    return by


def assert_near(state, expected, tolerance=1e-9):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state[name] - tensor).norm() <= tolerance * tensor.norm() + 1e-14, name


RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]
CASES = [(2, case) for case in GLOBAL]
CASES += [pytest.param(4, case, marks=pytest.mark.slow) for case in GLOBAL if case not in SLOW]


@pytest.mark.process
@pytest.mark.parametrize(("n", "case"), CASES)
def test_with_global_statistics_any_number_of_ranks_takes_the_steps_of_one(results, case, n):
    for i, of_rank in enumerate(results(n)):
        one, many = dict(results(1)[0][case]), dict(of_rank[case])
        if not case.startswith("statistics"):
            # a batch that every rank takes as a whole counts each value once per rank in the unbiased variance
            for name in [name for name in one if name.endswith("running_var")]:
                assert torch.allclose(many.pop(name), one.pop(name), rtol=0.5)
        assert_near(many, one)
        for name, tensor in results(n)[0][case].items():
            assert torch.equal(of_rank[case][name], tensor), (i, name)


@pytest.mark.process
@pytest.mark.parametrize("n", RANKS)
def test_with_statistics_of_each_rank_the_alphas_gradient_is_the_mean_of_the_ranks_gradients(results, n):
    expected = alpha_gradient(n_parts=n)
    for of_rank in results(n):
        assert_near(of_rank["alpha, fused"], expected)
        assert_near(of_rank["alpha, plain"], expected)
    assert_near(results(n)[0]["alpha, few"], alpha_gradient(n_parts=n, n=3))
    one = torch.cat([grad.flatten() for grad in results(1)[0]["alpha, fused"].values()])
    assert not torch.allclose(one, torch.cat([grad.flatten() for grad in results(n)[0]["alpha, fused"].values()]))


@pytest.mark.process
@pytest.mark.parametrize("n", RANKS)
def test_running_statistics_are_the_mean_of_the_ranks(results, n):
    totals = {}
    for a, b in itertools.pairwise(9 * i // n for i in range(n + 1)):
        net = small_net().train()
        net(batch(n=9)[0][a:b])
        for name, tensor in state_of(net).items():
            totals[name] = totals.get(name, 0) + tensor * ((b - a) / 9)
    assert_near(results(n)[0]["own statistics"], totals)


@pytest.mark.process
def test_ranks_with_their_own_statistics_stay_equal(results):
    first, second = results(2)
    for case in ("own search", "own augment"):
        for name, tensor in first[case].items():
            assert torch.equal(second[case][name], tensor), name


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 64])
def test_rows_are_each_taken_once_by_parts_of_at_least_two_or_all_by_all(monkeypatch, size, n):
    monkeypatch.setattr(ranks, "size", lambda: size)
    taken = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        taken.append(list(range(n))[ranks.rows(n)])
    if n < 2 * size:
        assert taken == [list(range(n))] * size
    else:
        assert list(itertools.chain(*taken)) == list(range(n))
        assert min(map(len, taken)) >= 2
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
    # `average` weights ranks by their rows, so that each row has the weight 1 / n
    rows = list(itertools.chain(*taken))
    assert [rows.count(row) / len(rows) for row in range(n)] == pytest.approx([1 / n] * n)


@pytest.mark.long
@pytest.mark.parametrize("execution", LAYOUTS)
def test_on_one_rank_global_statistics_are_those_of_batch_norm(execution):
    assert_near(searched(execution), searched(execution, sync_bn=False))
