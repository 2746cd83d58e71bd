"""What a step asks of a GPU, counted without one: launches, and waiting for numbers.

The search runs in the layout that CUDA uses. Fake tensors have shapes and no numbers.
"""

import pytest
import torch
from conftest import Batches, batch
from epochs import augment_epoch, search_epoch
from launches import Launches, lie_alike
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2
from models.augment_cnn import AugmentCNN
from models.fast import search_cell
from models.search_cnn import SearchCNN


@pytest.fixture(autouse=True)
def layout_of_cuda(monkeypatch):
    monkeypatch.setattr(search_cell, "layout_for", lambda x: search_cell.BATCHED)


def search_net(**changes):
    arguments = {"C_in": 1, "C": 4, "n_classes": 3, "n_layers": 3, "criterion": nn.CrossEntropyLoss()}
    return SearchCNN(**arguments | changes)


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *(("search", ""), ("search", "--order first"), ("search", "--amp --recompute --sync-bn")),
        *(("augment", ""), ("augment", "--amp --sync-bn")),
    ],
)
def test_a_step_waits_for_the_device_once_and_depends_on_no_other_number(stage, options, monkeypatch):
    """Reading a fake tensor's numbers is an error, except by `tolist`, which gives ones here."""
    reads = []

    def read(tensor):
        reads.append(len(tensor))
        return [1.0] * len(tensor)

    monkeypatch.setattr(FakeTensor, "tolist", read)
    with FakeTensorMode() as mode:
        X, y = batch(dtype=torch.float32)
        batches = Batches([(mode.from_tensor(X), mode.from_tensor(y))] * 2)
        if stage == "search":
            config = SearchConfig([*options.split(), "--device", "cpu", "--overwrite"])
            net = search_net(n_nodes=1, recompute=config.recompute)
            search_epoch(config, net, batches, fused=True)()
        else:
            config = AugmentConfig(["--genotype", "DARTS_V2", *options.split(), "--device", "cpu", "--overwrite"])
            net = AugmentCNN(8, 1, 4, 3, 3, True, DARTS_V2).train()
            net.drop_path_prob(0.2)
            augment_epoch(config, net, batches)()
    assert len(reads) == len(batches)
