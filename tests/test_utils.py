import pytest
import torch

from utils import AverageMeter, accuracy


def test_accuracy_is_the_fraction_of_targets_among_the_k_largest():
    output = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.9, 0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.4]])
    target = torch.tensor([2, 0, 2])
    assert [a.item() for a in accuracy(output, target, topk=(1, 2, 3))] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_accuracy_of_top_5_with_fewer_classes_counts_every_sample():
    assert accuracy(torch.randn(7, 3), torch.zeros(7, dtype=torch.long), topk=(1, 5))[1].item() == 1.0


def test_average_meter_weights_by_count():
    meter = AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert (meter.val, meter.avg, meter.count, meter.sum) == (5.0, 2.0, 4, 8.0)
    meter.reset()
    assert (meter.avg, meter.count) == (0.0, 0)
