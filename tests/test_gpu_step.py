"""What a step asks of a GPU, shown without one: launches, waiting, and copies from the CPU.

The search runs on the path that CUDA takes. Where tensors are fake, they have shapes and no numbers, so that whatever
depends on a number raises an error.
"""

import sys

import pytest
import torch
from conftest import Batches, batch
from epochs import augment_epoch, search_epoch
from launches import Launches, lie_alike
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2
from models.augment_cnn import AugmentCNN
from models.fast import search_cell
from models.search_cnn import SearchCNN
from models.sync_bn import synchronise

both_stages = pytest.mark.parametrize("stage", ["search", "augment"])
both_kinds = pytest.mark.parametrize("options", ["", "--amp --recompute --sync-bn"])


@pytest.fixture(autouse=True)
def path_of_cuda(monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)


def search_net(options="", **changes):
    arguments = {"C_in": 1, "C": 4, "n_classes": 3, "n_layers": 3, "criterion": nn.CrossEntropyLoss()}
    return SearchCNN(**arguments | {"recompute": "--recompute" in options} | changes)


def augment_net():
    net = AugmentCNN(8, 1, 4, 3, 3, True, DARTS_V2).train()
    net.drop_path_prob(0.2)
    return net


def epoch_of(stage, options, batches, **changes):
    """A function that takes the steps of an epoch on these batches."""
    if stage == "search":
        config = SearchConfig([*options.split(), "--device", "cpu", "--overwrite"])
        return search_epoch(config, search_net(options, n_nodes=1), batches, **changes)
    words = [word for word in options.split() if word != "--recompute"]
    config = AugmentConfig(["--genotype", "DARTS_V2", *words, "--device", "cpu", "--overwrite"])
    return augment_epoch(config, augment_net(), batches)


@pytest.mark.long
def test_a_second_order_step_of_the_default_network_launches_at_most_12_000_kernels():
    net = search_net(C_in=3, C=16, n_classes=10, n_layers=8).to(memory_format=torch.channels_last)
    batches = Batches(batch(n=4, channels=3, n_classes=10, dtype=torch.float32, seed=seed) for seed in range(2))
    epoch = search_epoch(SearchConfig(["--device", "cpu", "--overwrite"]), net, batches)
    with Launches() as counter:
        epoch()
    assert counter.count / len(batches) <= 12_000


def test_all_gradients_lie_in_memory_as_their_weights():
    net = search_net().to(memory_format=torch.channels_last)
    weights = list(net.weights())
    X, y = batch(dtype=torch.float32)
    gradients = torch.autograd.grad(net.loss(X, y), weights)
    net.loss(X, y).backward(inputs=weights)
    for weight, gradient in zip(weights, gradients):
        assert lie_alike([weight, gradient])
        assert lie_alike([weight, weight.grad])


class Reads(TorchFunctionMode):
    """Lists what makes Python wait for a tensor's numbers. Adam's counts of steps are on the CPU, and are left out."""

    WAITING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WAITING and "/torch/optim/" not in sys._getframe(1).f_code.co_filename:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *(("search", ""), ("search", "--order first"), ("search", "--amp --recompute --sync-bn")),
        *(("augment", ""), ("augment", "--amp --sync-bn")),
    ],
)
def test_a_step_waits_for_the_device_once(stage, options):
    batches = Batches(batch(dtype=torch.float32, seed=seed) for seed in range(3))
    epoch = epoch_of(stage, options, batches)
    with Reads() as reads:
        epoch()
    assert reads.names == ["tolist"] * len(batches)


@pytest.fixture
def reading_nothing(monkeypatch):
    """The one read of a step gives ones."""
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [1.0] * len(self))


@pytest.mark.long
@both_kinds
@both_stages
def test_a_step_depends_on_no_number_but_those_that_it_reads(stage, options, reading_nothing):
    with FakeTensorMode() as mode:
        X, y = batch(dtype=torch.float32)
        batches = Batches([(mode.from_tensor(X), mode.from_tensor(y))] * 2)
        epoch_of(stage, options, batches, **({"fused": True} if stage == "search" else {}))()


class Copies(TorchDispatchMode):
    """Lists the operations that bring numbers from the CPU to the GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        inputs, outputs = (
            {leaf.device.type for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), results)
        )
        if "cpu" in inputs and "cuda" in inputs | outputs:
            self.names.append(func.name())
        return results


@pytest.mark.long
# Without a GPU autograd's engine refuses a backward pass on CUDA, and autocast is switched off.
@pytest.mark.parametrize("options", ["", "--sync-bn"])
@both_stages
def test_a_forward_pass_on_cuda_copies_nothing_from_the_cpu(stage, options):
    with FakeTensorMode(), torch.device("cuda"):
        net = search_net(options, n_nodes=2) if stage == "search" else augment_net()
        X, y = torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.int64)
        if "--sync-bn" in options:
            synchronise(net)
        with Copies() as copies:
            logits = net(X) if stage == "search" else sum(net(X))
            loss = nn.functional.cross_entropy(logits, y)
    assert loss.device.type == "cuda"
    assert copies.names == []
