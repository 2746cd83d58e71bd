import logging

import pytest
import torch
from torch import nn

from genotypes import DARTS_V2
from models.augment_cnn import AugmentCNN
from run.checkpoints import save_checkpoint
from utils import AverageMeter, accuracy, get_logger, param_size


def test_accuracy_is_the_fraction_of_targets_among_the_k_largest():
    output = torch.tensor([[0.1, 0.9, 0.5, 0.2], [0.9, 0.1, 0.2, 0.3], [0.3, 0.2, 0.1, 0.4]])
    target = torch.tensor([2, 0, 2])
    assert [a.item() for a in accuracy(output, target, topk=(1, 2, 3))] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_accuracy_of_top_5_with_fewer_classes_counts_every_sample():
    assert accuracy(torch.randn(7, 3), torch.zeros(7, dtype=torch.long), topk=(1, 5))[1].item() == 1.0


def test_accuracy_takes_non_contiguous_outputs():
    output, target = torch.randn(10, 50).t(), torch.randint(10, (50,))
    assert [a.item() for a in accuracy(output, target, (1, 5))] == [
        a.item() for a in accuracy(output.contiguous(), target, (1, 5))
    ]


def test_average_meter_weights_by_count():
    meter = AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert (meter.val, meter.avg, meter.count, meter.sum) == (5.0, 2.0, 4, 8.0)
    meter.reset()
    assert (meter.avg, meter.count) == (0.0, 0)


def test_param_size_is_in_millions_without_the_auxiliary_head():
    assert param_size(AugmentCNN(32, 3, 36, 10, 20, True, DARTS_V2)) == 3.351502
    assert param_size(nn.Linear(10, 10, bias=False)) == 1e-4


def test_logger_writes_each_line_once_and_leaves_the_root_logger_alone(tmp_path, capsys):
    root_handlers = list(logging.getLogger().handlers)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    get_logger(first).info("one")
    logger = get_logger(first)
    logger.info("two")
    get_logger(second).info("three")
    assert first.read_text().count("two") == 1
    assert "three" not in first.read_text()
    assert second.read_text().endswith("three\n")
    assert capsys.readouterr().out.count("three") == 1
    assert logger.name == "darts"
    assert not logger.propagate
    assert logging.getLogger().handlers == root_handlers


def test_save_checkpoint_writes_the_last_and_on_demand_the_best(tmp_path):
    save_checkpoint({"epoch": 1}, tmp_path, is_best=True)
    save_checkpoint({"epoch": 2}, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == {"epoch": 2}
    assert torch.load(tmp_path / "best.pt", weights_only=True) == {"epoch": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "checkpoint.pt"]
