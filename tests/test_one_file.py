"""examples/darts_in_one_file.py takes the steps that search.py takes, and runs by itself."""

import ast
import sys

import pytest
import torch
from conftest import ROOT, Batches, batch

import search
from architect import Architect
from config import SearchConfig
from examples import darts_in_one_file as one_file
from genotypes import from_str
from models.search_cnn import SearchCNN
from run.run import Run
from utils import cosine_lr


@pytest.mark.long
def test_twenty_steps_of_the_one_file_and_of_search_py_end_with_the_same_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--layers 3 --init-channels 2 --nodes 2 --execution plain --device cpu"
    w_batches, alpha_batches = (Batches(batch(seed=seed + step) for step in range(20)) for seed in (100, 200))

    config, cpu = SearchConfig(words.split()), torch.device("cpu")
    net, w_optim, alpha_optim = search.build(SearchCNN, Architect, config, cpu, channels=1, n_classes=3)
    net.double()
    with torch.no_grad():
        for alpha in net.alphas():
            alpha.normal_()  # so that the order of the raw alphas is not that of their softmax
        net.linear.weight.mul_(20)  # so that w's gradients are clipped

    other = one_file.Network(C_in=1, C=2, n_classes=3, n_layers=3, n_nodes=2).double()
    other.load_state_dict(net.state_dict())  # both have the same names
    initial = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    architect = Architect(net, config.w_momentum, config.w_weight_decay)
    scheduler = cosine_lr(w_optim, config.epochs)
    search.train(1, Run(config), net, architect, w_batches, alpha_batches, w_optim, alpha_optim, scheduler)
    one_file.train(other, w_batches, alpha_batches, *one_file.optimizers(other))

    norm = torch.nn.utils.get_total_norm([w.grad for w in net.weights()])
    assert torch.isclose(norm, norm.new_tensor(config.w_grad_clip))  # the last gradient was clipped
    assert net.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert not torch.equal(tensor, initial[name]), name
        # float64 rounds at 1e-16; eq. 7 divides that by eps, about 0.01, and Adam by the size of the gradient
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)
    assert other.genotype() == net.genotype()


@pytest.mark.long
def test_the_one_file_prints_a_genotype_that_augment_py_takes(capsys):
    one_file.main(epochs=1, batch_size=600)
    *progress, genotype = capsys.readouterr().out.splitlines()
    assert len(progress) == 1
    assert len(from_str(genotype).normal) == 2


def test_the_one_file_needs_torch_and_scikit_learn_only():
    tree = ast.parse((ROOT / "examples" / "darts_in_one_file.py").read_text(encoding="utf-8"))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imports} - sys.stdlib_module_names == {"torch", "sklearn"}
