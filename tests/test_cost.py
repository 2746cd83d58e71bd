"""What a network costs, against counts by hand and published ones."""

import re

import pytest
import torch
from short_runs import command, refused
from torch import nn

import cost as cost_script
from genotypes import DARTS_V2, PUBLISHED
from models.augment_cnn import AugmentCNN
from models.costs import activation_bytes, cost, describe_latency
from models.ops import PoolBN
from utils import param_size

# (cell, channels at CIFAR-10's size) for which 20 cells have the parameters that the paper gives
CIFAR = [("DARTS_V2", 36), ("PC_DARTS_CIFAR", 36), ("P_DARTS", 36), ("NASNET_A", 33), ("AMOEBANET_A", 36)]
LATENCY = r"[\d.]+ \([\d.]+ to [\d.]+\) ms for one image, median \(range\) of 2 passes"
IMAGENET = ["DARTS_V2", "PC_DARTS_IMAGENET", "P_DARTS"]


def rounded_as(published, value):
    """The value to as many digits as the published one has after the point."""
    return round(value, len(str(published).partition(".")[2]))


@pytest.mark.parametrize(("name", "C"), CIFAR)
def test_published_cells_have_their_published_parameters_on_cifar(name, C):
    published = PUBLISHED[name].results["cifar10_params_M"]
    net = AugmentCNN(32, 3, C, 10, 20, False, PUBLISHED[name].genotype)
    size = param_size(net)
    if name == "DARTS_V2":  # 3.35 M, of which 0.002 are the pools' BN, which has no weights there
        size -= sum(m[1].weight.numel() + m[1].bias.numel() for m in net.modules() if isinstance(m, PoolBN)) / 1e6
    assert rounded_as(published, size) == published


@pytest.mark.parametrize("name", IMAGENET)
def test_published_cells_have_their_published_parameters_on_imagenet(name):
    net = AugmentCNN(224, 3, 48, 1000, 14, True, PUBLISHED[name].genotype, stem="imagenet")
    assert rounded_as(4.7, param_size(net)) == PUBLISHED[name].results["imagenet_params_M"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_cell_runs_with_both_stems(name):
    for size, stem in ((16, "cifar"), (65, "imagenet")):
        net = AugmentCNN(size, 3, 4, 5, 3, True, PUBLISHED[name].genotype, stem=stem)
        logits, aux_logits = net(torch.randn(2, 3, size, size))
        assert logits.shape == aux_logits.shape == (2, 5)


@pytest.mark.parametrize("size", [64, 65, 70, 224])
def test_the_imagenet_stem_gives_a_quarter_and_an_eighth(size):
    net = AugmentCNN(size, 3, 4, 5, 1, False, DARTS_V2, stem="imagenet")
    s0, s1 = net.stem(torch.randn(1, 3, size, size))
    quarter = -(-size // 4)
    assert s0.shape[1:] == (4, quarter, quarter)
    assert s1.shape[1:] == (4, -(-quarter // 2), -(-quarter // 2))


def test_multiply_adds_and_parameters_are_those_worked_out():
    dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), dilated, nn.Flatten(), nn.Linear(256, 5))
    costs = cost(net, channels=3, size=16)
    assert costs["multiply_adds_M"] == pytest.approx((8 * 8 * 4 * (27 + 9) + 256 * 5) / 1e6)
    assert costs["parameters_M"] == pytest.approx((4 * 27 + 4 * 9 + 257 * 5) / 1e6)


def test_kept_memory_is_that_of_a_chain_worked_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    x = torch.randn(2, 3, 8, 8)
    # the convolution keeps its input, ReLU its output, which the linear layer keeps too
    assert activation_bytes(net, x) == 4 * (x.numel() + 2 * 4 * 64)


def test_measuring_leaves_the_network_as_it_was():
    net = AugmentCNN(16, 3, 4, 5, 3, True, DARTS_V2).train()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    cost(net, 3, 16)
    assert net.training
    assert re.fullmatch(LATENCY, describe_latency(net, 3, 16, rounds=2))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_command_prints_a_table_and_refuses_what_is_too_small(capsys):
    assert command(cost_script.main, ["DARTS_V1", "darts_v2", "--layers", 3, "--init-channels", 4, "--rounds", 1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["cell", "DARTS_V1", "darts_v2"]
    for option, too_small, smallest in (("--image-size", 63, 64), ("--init-channels", 1, 2)):
        words = ["DARTS_V2", "--stem", "imagenet", option, too_small]
        refused(capsys, cost_script.main, words, f"{option} {too_small}", f"at least {smallest}")
