"""What a network costs, against counts by hand and published ones."""

import re

import pytest
import torch
from conftest import assert_one_line_error, run_script
from torch import nn

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
    if name == "DARTS_V2":  # 3.35 M, of which 0.002 are the pools' BN, which has no weights there
        pools = sum(m[1].weight.numel() + m[1].bias.numel() for m in net.modules() if isinstance(m, PoolBN)) / 1e6
        assert rounded_as(published, param_size(net) - pools) == published
    else:
        assert rounded_as(published, param_size(net)) == published


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


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="cifar, imagenet"):
        AugmentCNN(32, 3, 4, 5, 1, False, DARTS_V2, stem="x")


def by_hand(net, size):
    """Multiply-adds of one image, in millions: weights that each output value of convolutions and classifier takes."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total / 1e6


def test_multiply_adds_are_those_counted_by_hand():
    gene = [[("sep_conv_3x3", 0), ("dil_conv_5x5", 1)], [("conv_7x1_1x7", 0), ("sep_conv_7x7", 2)]]
    genotype = DARTS_V2._replace(normal=gene, normal_concat=[2, 3])
    net = AugmentCNN(16, 3, 8, 10, 1, False, genotype)
    net.cells[0] = type(net.cells[0])(genotype, 24, 24, 8, False, False)  # hooks do not see FactorizedReduce
    net.linear = nn.Linear(16, 10)
    assert cost(net, 3, 16)["multiply_adds_M"] == pytest.approx(by_hand(net, 16))


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


@pytest.mark.process
def test_the_command_prints_a_table_and_refuses_what_is_too_small(tmp_path):
    words = ("--layers", 3, "--init-channels", 4, "--rounds", 1)
    process = run_script("cost.py", "DARTS_V1", "DARTS_V2", *words, cwd=tmp_path)
    assert [line.split()[0] for line in process.stdout.splitlines()[2:]] == ["cell", "DARTS_V1", "DARTS_V2"]
    for option, too_small, smallest in (("--image-size", 63, 64), ("--init-channels", 1, 2)):
        process = run_script("cost.py", "DARTS_V2", "--stem", "imagenet", option, too_small, cwd=tmp_path)
        assert_one_line_error(process, f"{option} {too_small}", f"at least {smallest}")


@pytest.mark.process
def test_training_on_images_of_any_size_with_the_imagenet_stem(tmp_path, image_folder):
    root = image_folder(size=80)
    words = ("--dataset", "folder", "--data-path", root, "--stem", "imagenet", "--genotype", "DARTS_V2", "--workers", 0)
    small = ("--layers", 3, "--init-channels", 4, "--batch-size", 8, "--epochs", 2)
    process = run_script("augment.py", *words, *small, "--image-size", 64, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "RandomResizedCrop" in process.stdout
    assert "lr 0.09700" in process.stdout  # 0.1 x 0.97 in the second epoch
    assert_one_line_error(run_script("augment.py", *words, "--image-size", 63, "--name", "small", cwd=tmp_path), "64")
