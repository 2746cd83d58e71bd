"""Many ranks compute what one does: the steps of both stages, and the scripts under torchrun."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from comparing import differences, outcome
from conftest import ROOT, Batches, assert_one_line_error, batch, run_script, small_net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import augment
import search
from architect import Architect
from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2, from_str
from machine import ranks
from models.augment_cnn import AugmentCNN
from models.fast import search_cell
from models.search_cnn import SearchCNN
from models.sync_bn import synchronise
from run.checkpoints import load_checkpoint
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
    net = small_net(kind=kind, C=4, n_nodes=1, execution="plain" if execution == "plain" else "fused", **changes)
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


def check_helpers():
    """What can only be seen from within: on_rank_0 and in_turn."""

    def complain():
        raise UserError("of rank 0")

    assert ranks.on_rank_0(lambda: ranks.rank() + 10) == 10
    with pytest.raises(UserError, match="of rank 0"):
        ranks.on_rank_0(complain)
    with pytest.raises(SystemExit):
        ranks.on_rank_0(lambda: sys.exit(0))
    assert ranks.in_turn(ranks.rank) == ranks.rank()


def work(rank, n, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=n)
    check_helpers()
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
    for execution in ("plain", "fused"):
        expected = alpha_gradient(n_parts=n, execution=execution)
        for of_rank in results(n):
            assert_near(of_rank[f"alpha, {execution}"], expected)
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


# The scripts.

TINY = ("--layers", 3, "--init-channels", 2, "--nodes", 2, "--batch-size", 128, "--workers", 0, "--print-freq", 2)
TINY_AUGMENT = (*TINY[:4], *TINY[6:], "--genotype", "DARTS_V2")


def torchrun(cwd, n, script, *words, options=(), wait=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    command += [*options, ROOT / script, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return process
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def values(run, tag):
    return [event.value for event in EventAccumulator(str(run / "tb")).Reload().Scalars(tag)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same search on one rank and on two, with global statistics: the folder that it was started in."""
    cwd = tmp_path_factory.mktemp("torchrun")
    assert run_script("search.py", *TINY, "--epochs", 2, "--name", "one", "--sync-bn", cwd=cwd).returncode == 0
    process = torchrun(cwd, 2, "search.py", *TINY, "--epochs", 2, "--name", "two", "--sync-bn", "--workers", 1)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("summary stage=search") == 1  # one rank writes
    return cwd


@pytest.mark.process
def test_a_search_under_torchrun_goes_as_in_one_process(runs):
    """As far as float32 goes: eq. 7 amplifies rounding. Above it is float64, to 1e-9."""
    for tag in ("step/loss", "step/alpha_loss"):
        one, two = (values(runs / "runs/search" / name, tag) for name in ("one", "two"))
        assert len(one) == 12
        assert one[:3] == pytest.approx(two[:3], rel=1e-4)
        assert one == pytest.approx(two, rel=0.05)
    states = [load_checkpoint(runs / "runs/search" / name / "checkpoint.pt") for name in ("one", "two")]
    for name, tensor in states[0]["parts"]["net"].items():
        if not name.endswith("running_mean"):  # of what is zero but for rounding
            assert torch.allclose(states[1]["parts"]["net"][name].double(), tensor.double(), rtol=1e-2, atol=1e-3), name
    assert [(state["step"], state["epoch"]) for state in states] == [(12, 2)] * 2


@pytest.mark.process
def test_a_run_may_be_resumed_on_another_number_of_ranks(runs):
    run = runs / "runs/search/two"
    process = torchrun(runs, 3, "search.py", "--resume", run, "--epochs", 3)
    assert process.returncode == 0, process.stderr
    process = run_script("search.py", "--resume", run, "--epochs", 4, cwd=runs)
    assert process.returncode == 0, process.stderr
    assert [epoch["epoch"] for epoch in json.loads((run / "history.json").read_text())] == [1, 2, 3, 4]


@pytest.mark.process
def test_augment_under_torchrun_trains_as_one_process(tmp_path):
    assert run_script("augment.py", *TINY_AUGMENT, "--epochs", 1, "--sync-bn", cwd=tmp_path).returncode == 0
    process = torchrun(tmp_path, 2, "augment.py", *TINY_AUGMENT, "--epochs", 1, "--sync-bn", "--name", "two")
    assert process.returncode == 0, process.stderr
    losses = [values(tmp_path / "runs/augment" / name, "step/loss") for name in ("digits", "two")]
    assert len(losses[0]) == 12
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-4)  # later, roundings have been amplified
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def children(process):
    """The processes that a process has started, by their numbers."""
    command = ["pgrep", "-P", str(process.pid)]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()))


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_rank_takes_the_run_down_and_torchruns_restart_ends_it_as_if_undisturbed(tmp_path):
    words = [*TINY, "--epochs", 3, "--checkpoint-minutes", 0]
    assert torchrun(tmp_path, 2, "search.py", *words).returncode == 0
    words += ["--name", "killed", "--auto-resume"]
    process = torchrun(tmp_path, 2, "search.py", *words, options=["--max-restarts", 2], wait=False)
    run = tmp_path / "runs/search/killed"
    while not (run / "checkpoint.pt").exists() or load_checkpoint(run / "checkpoint.pt")["step"] < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(children(process)[-1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "resumed after" in stdout
    assert differences(outcome(run.parent / "digits"), outcome(run)) == []


@pytest.mark.process
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    process = torchrun(tmp_path, 2, "search.py", *TINY, "--epochs", 50, wait=False)
    run = tmp_path / "runs/search/digits"
    while not (run / "genotype.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(children(process)[-1], signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stdout.count("SIGUSR1: stopped after step") == 1
    assert "Traceback" not in stderr.split("torch/distributed/elastic")[0]
    step = load_checkpoint(run / "checkpoint.pt")["step"]
    assert f"stopped after step {step}, saved" in stdout


@pytest.mark.process
def test_a_mistake_is_told_once_and_leaves_nothing(tmp_path):
    process = torchrun(tmp_path, 2, "search.py", "--dataset", "folder", "--data-path", tmp_path)
    assert process.returncode != 0
    assert process.stderr.count("search.py: error: ") == 1
    assert "Traceback" not in process.stderr.split("torch/distributed/elastic")[0]
    assert not (tmp_path / "runs").exists()
    process = torchrun(tmp_path, 2, "augment.py", "--evaluate", tmp_path)
    assert process.stderr.count("--evaluate takes one process") == 1


@pytest.mark.process
@pytest.mark.parametrize(
    "words", [("search.py", "--gpus=0,1"), ("augment.py", "--genotype", "DARTS_V2", "--gpus", "all")]
)
def test_gpus_that_are_not_there_are_refused_in_one_line(words, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a machine with GPUs the scripts see none
    assert_one_line_error(run_script(*words, cwd=tmp_path), "gpus")


@pytest.mark.parametrize(
    ("module", "program"), [(None, ["my_search.py"]), ("examples.sigmoid", ["-m", "examples.sigmoid"])]
)
def test_gpus_runs_the_command_again_by_torchrun(module, program, monkeypatch):
    started = []
    main = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words) or sys.exit(0))
    monkeypatch.setattr("sys.argv", ["my_search.py", "--gpus", "1", "--epochs", "2"])
    with pytest.raises(SystemExit):
        search.main(network=SearchCNN)
    ((_, *words),) = started
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=1" in words
    assert words[-4 - len(program) :] == [*program, "--gpus", "1", "--epochs", "2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_torchruns_ranks_go_on_after_the_terminal_closes_if_nohup_started_them():
    assert "SIGUSR1,SIGHUP" in ranks.torchrun_words(1)[-1]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "SIGHUP" not in ranks.torchrun_words(1)[-1]
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.process
def test_auto_resume_starts_goes_on_and_refuses_other_options(tmp_path):
    for _ in range(2):
        process = run_script("search.py", *TINY, "--epochs", 1, "--auto-resume", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    assert "all 1 epochs are done" in process.stdout
    words = (*TINY, "--epochs", 2, "--auto-resume")
    assert run_script("search.py", *words, cwd=tmp_path).returncode == 0
    assert_one_line_error(run_script("search.py", *words, "--seed", 3, cwd=tmp_path), "seed")
    assert_one_line_error(run_script("search.py", *words, "--overwrite", cwd=tmp_path), "--overwrite")
