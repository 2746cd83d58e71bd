"""Batches: the same for every number of workers, another augmentation for each seed, epoch and sample."""

import pytest
import torch
from test_data_sets import synthetic

from command_line.errors import UserError
from images.loading import Batches, Images, Loader
from preproc import data_transforms
from utils import get_data

CPU = torch.device("cpu")


def loaded(workers, epochs=(1, 2), shuffle=True, seed=0):
    data = get_data("digits", "unused", 4, False, seed=seed)[3]
    loader = Loader(data, range(60), 16, CPU, workers, shuffle, seed)
    return [[(X.clone(), y.clone()) for X, y, _ in loader.epoch(epoch)] for epoch in epochs]


def test_batches_are_the_same_for_every_number_of_workers():
    for workers in (1, 2):
        for one, other in zip(loaded(0), loaded(workers)):
            assert len(one) == len(other) == 4
            for (X, y), (X_other, y_other) in zip(one, other):
                assert torch.equal(X, X_other)
                assert torch.equal(y, y_other)


def test_batches_of_an_epoch_do_not_depend_on_the_epochs_before():
    for (X, _), (X_other, _) in zip(loaded(0, epochs=(2,))[0], loaded(0)[1]):
        assert torch.equal(X, X_other)


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loaded(0)
    loaded(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_by_seed_epoch_and_sample():
    image = synthetic("cifar10")[0]
    data = Images([image] * 2, [0, 0], data_transforms("cifar10", 16)[0], None, seed=1)
    other = Images([image] * 2, [0, 0], data_transforms("cifar10", 16)[0], None, seed=2)
    views = [data[1, 0][0], data[1, 1][0], data[2, 0][0], other[1, 0][0]]
    for i, a in enumerate(views):
        assert all(not torch.equal(a, b) for b in views[i + 1 :])
    assert torch.equal(data[1, 1][0], views[1])
    assert torch.equal(data[0][0], data[0, 0][0])


def test_each_epoch_has_every_sample_once_in_another_order():
    batches = Batches(range(10, 43), 8, shuffle=True, seed=0)
    orders = []
    for epoch in (1, 2):
        batches.epoch = epoch
        keys = [key for batch in batches for key in batch]
        assert {e for e, _ in keys} == {epoch}
        orders.append([sample for _, sample in keys])
    # 33 samples in eights leave one over: BN has no statistics of a single value, so training skips it
    assert len(batches) == 4
    assert all(len(set(order)) == 32 for order in orders)
    assert orders[0] != orders[1]
    plain = Batches(range(10, 43), 8, shuffle=False, seed=0)
    assert [s for batch in plain for _, s in batch] == list(range(10, 43))
    assert len(plain) == 5
    assert len(Batches(range(5), 8, True, 0)) == 1
    assert len(Batches(range(5), 1, True, 0)) == 5
    with pytest.raises(UserError, match="too few images"):
        Loader(get_data("digits", "", 0, False)[3], [3], 8, CPU)
