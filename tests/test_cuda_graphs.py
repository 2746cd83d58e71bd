"""The logic of machine/cuda_graphs.py on the CPU, where a stand-in records and replays: see replayed.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Batches, batch, small_net
from replayed import replayed  # noqa: F401 -- a fixture
from torch import nn

import search
from architect import Architect
from command_line.errors import UserError
from config import SearchConfig
from examples.gumbel import GumbelCNN
from machine import ranks
from machine.cuda_graphs import EAGER_STEPS, StepGraphs, reason_against
from machine.signals import StoppedError
from models.search_cnn import SearchCNN
from run.run import Run
from utils import cosine_lr
from variants import compose

STEPS = 4  # an epoch, the last one with fewer images
SPACE = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")


class NumberedBatches(Batches):
    def samples(self, epoch, batch):
        return torch.arange(6)


def batches(seed, last=5):
    sizes = [8] * (STEPS - 1) + [last]
    return NumberedBatches(batch(n=n, dtype=torch.float32, seed=seed + i) for i, n in enumerate(sizes))


class Search:
    """A search on batches in a list."""

    def __init__(self, words="", kind=SearchCNN, architect=Architect):
        self.config = SearchConfig([*words.split(), "--device", "cpu", "--epochs", "3", "--w-lr", "0.1"])
        kind, architect = compose(self.config, kind, architect)
        net = small_net(
            dtype=torch.float32, kind=kind, C=4, n_nodes=1, primitives=SPACE, recompute=self.config.recompute
        )
        self.net = net.to(memory_format=torch.channels_last)
        self.w_optim = torch.optim.SGD(self.net.weights(), 0.1, momentum=0.9, weight_decay=3e-4, fused=True)
        self.alpha_optim = torch.optim.Adam(self.net.alphas(), 0.01, betas=(0.5, 0.999))
        self.architect = architect(self.net, 0.9, 3e-4)
        self.run, self.lines, self.epochs_done = Run(self.config), [], 0
        self.run.log = lambda line: self.lines.append(line) if "graph" in line else None
        self.graphs = StepGraphs(self.run, self.net, self.architect)

    def epochs(self, n, first=0, trn=None, val=None):
        """Run n epochs, the first of them from step `first`; returns the search."""
        torch.manual_seed(1)
        for epoch in range(self.epochs_done + 1, self.epochs_done + n + 1):
            scheduler = cosine_lr(self.w_optim, 3, done=self.epochs_done)
            self.net.begin_epoch(epoch, 3)
            self.run.position = self.run.position | {"batches": first, "meters": []}
            trained = trn or batches(10), val or batches(20)
            optimizers = self.w_optim, self.alpha_optim, scheduler
            search.train(epoch, self.run, self.net, self.architect, *trained, *optimizers, self.graphs)
            scheduler.step()
            self.epochs_done, first = epoch, 0
        return self

    def state(self, of_net=nn.Module.state_dict):
        optimizers = [optim.state_dict() for optim in (self.w_optim, self.alpha_optim)]
        return copy.deepcopy([of_net(self.net), *optimizers])


def assert_same_bits(state, other):
    leaves, others = map(torch.utils._pytree.tree_leaves, (state, other))
    assert len(leaves) == len(others)
    for a, b in zip(leaves, others):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def replays(graphs):
    return [graph.replays for graph in graphs]


REPLAYED = STEPS - EAGER_STEPS - 1  # steps of an epoch


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        *("", "--order first --amp", "--amp --recompute"),
        *("--variant beta-darts", "--variant darts-minus"),  # whose `begin_epoch` changes numbers
    ],
)
def test_replayed_steps_have_the_bits_of_eager_ones(words, replayed):  # noqa: F811
    replayed(False)
    eager = Search(words).epochs(2)
    graphs = replayed(True)
    found = Search(words).epochs(2)
    assert replays(graphs) == [REPLAYED] * 4  # alpha and w, recorded in each epoch with its learning rate
    assert found.lines == eager.lines == []
    assert_same_bits(found.state(), eager.state())


@pytest.mark.long
def test_an_epoch_in_which_alphas_do_not_learn_replays_w(replayed):  # noqa: F811
    words = "--variant pc-darts --pc-warm-up 1"
    replayed(False)
    eager = Search(words).epochs(2)
    graphs = replayed(True)
    assert_same_bits(Search(words).epochs(2).state(), eager.state())
    assert replays(graphs) == [REPLAYED] * 3


@pytest.mark.long
def test_noise_is_drawn_anew_for_each_replayed_step(replayed):  # noqa: F811
    replayed(False)
    eager = Search(kind=GumbelCNN).epochs(2)
    graphs = replayed(True)
    assert_same_bits(Search(kind=GumbelCNN).epochs(2).state(), eager.state())
    assert replays(graphs) == [REPLAYED] * 4


@pytest.mark.long
def test_a_run_that_is_resumed_within_an_epoch_warms_up_and_has_the_same_bits(replayed):  # noqa: F811
    replayed(False)
    eager = Search().epochs(2)
    replayed(True)
    stopped, resumed = Search(), Search()

    def stop():
        if stopped.run.step == 2:
            raise StoppedError

    stopped.run.stop_if_asked = stop
    with pytest.raises(StoppedError):
        stopped.epochs(1)
    graphs = replayed(True)
    for part in ("net", "w_optim", "alpha_optim"):
        getattr(resumed, part).load_state_dict(copy.deepcopy(getattr(stopped, part).state_dict()))
    resumed.epochs(2, first=2)
    assert_same_bits(resumed.state(), eager.state())
    assert replays(graphs) == [REPLAYED] * 2  # two steps were left of the first epoch


@pytest.mark.parametrize("phase", ["alpha", "w"])
def test_a_replayed_step_that_is_not_finite_leaves_all_as_it_was(phase, replayed, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    bad = batches(30)
    bad[2] = bad[2][0] * float("inf"), bad[2][1]
    given = {"val" if phase == "alpha" else "trn": bad}
    graphs, states, parameters = replayed(True), [], lambda net: dict(net.named_parameters())
    faulty = Search("--order first")
    check = faulty.run.note_position

    def remember(meters):
        states.append(faulty.state(parameters))
        check(meters)

    faulty.run.note_position = remember
    with pytest.raises(UserError, match=f"step 3, phase {phase}"):
        faulty.epochs(1, **given)
    assert replays(graphs) == [1, 1]
    assert len(states) == 2
    assert_same_bits(faulty.state(parameters), states[-1])


class ReadsANumber(SearchCNN):
    def forward(self, x):
        return super().forward(x if x.sum().item() < 0 else 0.9 * x)


class CountsSteps(SearchCNN):
    steps = 0

    def draw_noise(self):
        self.steps += 1

    def forward(self, x):
        return super().forward(x) / self.steps


class KeepsATensor(SearchCNN):
    def draw_noise(self):
        self.kept = torch.rand(())

    def forward(self, x):
        return super().forward(x) * self.kept


class DrawsInPasses(SearchCNN):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1))


class NoiseOfNumbers(SearchCNN):
    def draw_noise(self):
        return [float(torch.rand(()))]

    def edge_weights(self, noise=None):
        weights = super().edge_weights()
        return weights if noise is None else {kind: [noise[0] * w for w in weights[kind]] for kind in weights}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadsANumber, "not permitted when stream is capturing"),
        (CountsSteps, "CountsSteps.steps changes from step to step"),
        (KeepsATensor, "KeepsATensor.kept changes from step to step"),
        (DrawsInPasses, "draws random numbers"),
        (NoiseOfNumbers, "the network's noise is not made of tensors"),
    ],
)
def test_what_no_graph_can_repeat_runs_eagerly_and_a_line_in_the_log_says_why(kind, reason, replayed):  # noqa: F811
    replayed(False)
    eager = Search(kind=kind).epochs(2)
    graphs = replayed(True)
    found = Search(kind=kind).epochs(2)
    assert_same_bits(found.state(), eager.state())
    assert sum(replays(graphs)) == 0
    assert len(found.lines) == 1
    assert found.lines[0].startswith("no CUDA graphs from here on: ")
    assert reason in found.lines[0]


@pytest.mark.long
def test_the_stand_in_fails_where_a_tensor_that_was_recorded_is_replaced(replayed):  # noqa: F811
    replayed(True)
    for replace in (load_momentum_anew, move_a_weight):
        broken = Search()
        check = broken.run.stop_if_asked

        def between_steps(broken=broken, replace=replace, check=check):
            if broken.run.step == 3:  # the one that was recorded
                replace(broken)
            check()

        broken.run.stop_if_asked = between_steps
        with pytest.raises(AssertionError, match="a tensor that was recorded has"):
            broken.epochs(1, trn=batches(10, last=8), val=batches(20, last=8))


def load_momentum_anew(found):
    found.w_optim.load_state_dict(copy.deepcopy(found.w_optim.state_dict()))


def move_a_weight(found):
    found.net.linear.weight.data = found.net.linear.weight.data.clone()


@pytest.mark.parametrize(
    ("words", "device", "n_ranks", "reason"),
    [
        ("", "cuda", 1, None),
        ("--amp --recompute", "cuda:1", 1, None),
        ("", "cpu", 1, "the device is not CUDA"),
        ("--sync-bn", "cuda", 1, "--sync-bn is given"),
        ("--cuda-graphs off", "cuda", 1, "--cuda-graphs is off"),
        ("", "cuda", 2, "there are several ranks"),
    ],
)
def test_graphs_are_for_one_process_on_cuda(words, device, n_ranks, reason, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: n_ranks)
    assert reason_against(SearchConfig(words.split()), torch.device(device)) == reason
