"""The logic of machine/cuda_graphs.py on the CPU, where a stand-in records and replays: see replayed.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import Batches, batch, small_net
from epochs import search_epoch
from replayed import replayed  # noqa: F401 -- a fixture

from architect import Architect
from config import SearchConfig
from examples.gumbel import GumbelCNN
from machine import ranks
from machine.cuda_graphs import EAGER_STEPS, StepGraphs, reason_against
from models.search_cnn import SearchCNN
from variants import compose

STEPS = 4  # of an epoch; the last one has fewer images
REPLAYED = STEPS - EAGER_STEPS - 1
SPACE = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")


def two_epochs(words="", kind=SearchCNN):
    """The network's state after two epochs of a search by the script's own loop, and the lines that it logged."""
    config = SearchConfig([*words.split(), "--device", "cpu", "--w-lr", "0.1"])
    kind, architect = compose(config, kind, Architect)
    net = small_net(dtype=torch.float32, kind=kind, C=4, n_nodes=1, primitives=SPACE, recompute=config.recompute)
    net.to(memory_format=torch.channels_last)
    sizes = [8] * (STEPS - 1) + [5]
    batches = Batches(batch(n=n, dtype=torch.float32, seed=seed) for seed, n in enumerate(sizes))
    lines = []
    torch.manual_seed(1)
    for epoch in (1, 2):
        net.begin_epoch(epoch, 3)
        search_epoch(config, net, batches, architect=architect, log=lines.append)()
    return net.state_dict(), [line for line in lines if "graphs" in line]


def assert_same_bits(state, other):
    assert state.keys() == other.keys()
    assert [name for name, value in state.items() if not torch.equal(value, other[name])] == []


def replays(graphs):
    return [graph.replays for graph in graphs]


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "kind", "recordings"),  # of two epochs, in each of which alpha's and w's gradients are recorded
    [
        *(("", SearchCNN, 4), ("--order first --amp", SearchCNN, 4), ("--amp --recompute", SearchCNN, 4)),
        ("--variant beta-darts", SearchCNN, 4),  # its `begin_epoch` changes numbers, as does that of the next
        ("--variant darts-minus", SearchCNN, 4),
        ("--variant pc-darts --pc-warm-up 1", SearchCNN, 3),  # alphas do not learn in the first epoch
        ("", GumbelCNN, 4),  # noise is drawn in each step
    ],
)
def test_replayed_steps_have_the_bits_of_eager_ones(words, kind, recordings, replayed):  # noqa: F811
    replayed(False)
    eager, _ = two_epochs(words, kind)
    graphs = replayed(True)
    state, lines = two_epochs(words, kind)
    assert replays(graphs) == [REPLAYED] * recordings
    assert lines == []
    assert_same_bits(state, eager)


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
def test_what_no_graph_can_repeat_runs_eagerly_and_the_log_says_why(kind, reason, replayed):  # noqa: F811
    replayed(False)
    eager, _ = two_epochs(kind=kind)
    graphs = replayed(True)
    state, lines = two_epochs(kind=kind)
    assert_same_bits(state, eager)
    assert sum(replays(graphs)) == 0
    assert lines
    assert all(line.startswith("no CUDA graphs from here on: ") and reason in line for line in lines)


class Run:
    """What `StepGraphs` needs of a run."""

    config = SearchConfig([])
    device = torch.device("cpu")
    log = print


def test_gradients_that_depend_on_an_optimizers_count_of_steps_are_not_repeated(replayed):  # noqa: F811
    graphs, weight = replayed(True), torch.nn.Parameter(torch.ones(3))
    net, optimizer = small_net(), torch.optim.Adam([weight])
    step_graphs = StepGraphs(Run, net, Architect(net, 0.9, 3e-4))

    def divided(x, optimizer):
        steps = optimizer.state[weight]["step"].item() if weight in optimizer.state else 0
        weight.grad = x / (1 + steps)

    for step in range(EAGER_STEPS + 2):
        step_graphs.run(divided, inputs=(torch.ones(3),), fixed=(optimizer,), fills=[weight])
        assert torch.equal(weight.grad, torch.ones(3) / (1 + step))
        optimizer.step()
    assert graphs == []


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
