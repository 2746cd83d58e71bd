"""The training loops of both scripts against steps written out by hand."""

import shlex

import numpy as np
import pytest
import torch
from conftest import Batches, batch, small_net
from torch import nn

import augment
import search
from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import DARTS_V2
from images.loading import Loader
from models.augment_cnn import AugmentCNN
from models.ops import DropPath_
from run.run import Run
from utils import cosine_lr


def sgd_by_hand(weights, grads, buffers, lr, momentum, decay, clip):
    """Clip by the norm of all gradients together, then SGD with momentum and decay (PyTorch's conventions)."""
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert norm > clip  # so that clipping is tested
    for i, (w, g) in enumerate(zip(weights, grads)):
        step = g * clip / (norm + 1e-6) + decay * w
        buffers[i] = step if buffers[i] is None else momentum * buffers[i] + step
        w.sub_(lr * buffers[i])


@pytest.mark.parametrize("order", ["second", "first"])
def test_a_search_epoch_is_algorithm_1_written_out(order):
    trn, val = (Batches(batch(seed=seed + i) for i in range(3)) for seed in (10, 20))
    words = ["--order", order, "--w-lr", "0.1", "--w-grad-clip", "0.01", "--alpha-lr", "0.05", "--device", "cpu"]
    config = SearchConfig(
        [*words, "--overwrite", "--w-weight-decay", "0.01", "--alpha-weight-decay", "0.1", "--w-momentum", "0.8"]
    )

    def parts(net):
        w_optim = torch.optim.SGD(net.weights(), config.w_lr, momentum=0.8, weight_decay=0.01)
        alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=0.1)
        return w_optim, alpha_optim, Architect(net, 0.8, 0.01)

    net = small_net(smooth=True)
    w_optim, alpha_optim, architect = parts(net)
    search.train(1, Run(config), net, architect, trn, val, w_optim, alpha_optim, cosine_lr(w_optim, 50))

    other = small_net(smooth=True).train()
    w_state, _, other_architect = parts(other)
    weights, alphas = list(other.weights()), list(other.alphas())
    buffers, m, v = [None] * len(weights), [0] * len(alphas), [0] * len(alphas)
    for t, (trn_batch, val_batch) in enumerate(zip(trn, val), 1):
        xi = config.w_lr if order == "second" else 0.0
        for w, buf in zip(weights, buffers):  # eq. 6 reads the momentum from an optimizer
            w_state.state[w]["momentum_buffer"] = torch.zeros_like(w) if buf is None else buf
        other_architect.unrolled_backward(*trn_batch, *val_batch, xi, w_state)
        with torch.no_grad():
            for i, alpha in enumerate(alphas):
                g = alpha.grad + 0.1 * alpha
                m[i], v[i] = 0.5 * m[i] + 0.5 * g, 0.999 * v[i] + 0.001 * g**2
                alpha.sub_(0.05 * (m[i] / (1 - 0.5**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8))
        grads = torch.autograd.grad(other.loss(*trn_batch), weights)  # at the new alpha
        with torch.no_grad():
            sgd_by_hand(weights, grads, buffers, 0.1, 0.8, 0.01, 0.01)

    for (name, parameter), expected in zip(net.named_parameters(), other.parameters()):
        # eq. 7 divides the rounding of float64 by about 0.01 / ||d||, and Adam by the gradient's size
        assert torch.allclose(parameter, expected, rtol=1e-6, atol=1e-9), name
    for (name, buffer), expected in zip(net.named_buffers(), other.buffers()):
        assert torch.allclose(buffer, expected, rtol=1e-6, atol=1e-9), name  # only the w step moved the statistics


def test_an_augment_epoch_is_sgd_on_the_loss_with_the_auxiliary_one_by_its_weight():
    batches = Batches(batch(n=5, seed=i) for i in range(3))
    words = "--genotype DARTS_V2 --grad-clip 0.1 --aux-weight 0.3 --label-smoothing 0.2 --device cpu"
    config, criterion = AugmentConfig(words.split()), nn.CrossEntropyLoss(label_smoothing=0.2)

    def fresh():
        torch.manual_seed(0)
        return AugmentCNN(8, 1, 2, 3, 3, True, DARTS_V2).double().train()

    net, other = fresh(), fresh()
    optim = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9, weight_decay=0.01)
    augment.train(1, Run(config), net, batches, optim)
    weights = list(other.parameters())
    buffers = [None] * len(weights)
    for X, y in batches:
        logits, aux_logits = other(X)
        grads = torch.autograd.grad(criterion(logits, y) + 0.3 * criterion(aux_logits, y), weights)
        with torch.no_grad():
            sgd_by_hand(weights, grads, buffers, 0.2, 0.9, 0.01, 0.1)
    for (name, parameter), expected in zip(net.named_parameters(), weights):
        assert torch.allclose(parameter, expected, rtol=1e-9, atol=1e-12), name


def test_drop_path_grows_linearly_from_zero(tmp_path, monkeypatch):
    seen = []

    def record(epoch, run, net, loader, optim, *more):
        probabilities = {module.p for module in net.modules() if isinstance(module, DropPath_)}
        assert len(probabilities) == 1
        seen.extend(probabilities)
        optim.step()  # before the schedule's step

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(augment, "train", record)
    monkeypatch.setattr(augment, "validate", lambda *arguments: 0.5)
    monkeypatch.setattr(
        "sys.argv", ["augment.py", *shlex.split("--genotype DARTS_V2 --layers 3 --init-channels 2 --epochs 4")]
    )
    augment.main()
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15])


@pytest.mark.long
def test_w_and_alpha_learn_on_different_halves_and_validation_is_on_alphas(tmp_path, monkeypatch):
    loaders, batches = [], []

    class WatchedLoader(Loader):
        def __init__(self, images, samples, *args, **options):
            super().__init__(images, samples, *args, **options)
            loaders.append((images, np.asarray(samples)))

    def watched(epoch, run, net, architect, w_loader, alpha_loader, w_optim, alpha_optim, *more):
        batches.extend((w_loader, alpha_loader, w_optim, alpha_optim, list(net.weights()), list(net.alphas())))
        w_optim.step()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "Loader", WatchedLoader)
    monkeypatch.setattr(search, "train", watched)
    words = "--layers 3 --init-channels 2 --nodes 1 --epochs 1 --batch-size 360 --workers 0 --eigenvalue-images 0"
    monkeypatch.setattr("sys.argv", ["search.py", *shlex.split(words)])
    search.main()
    (w_images, w_half), (alpha_images, alpha_half), (valid_images, valid_half) = loaders
    assert sorted([*w_half, *alpha_half]) == list(range(len(w_images)))  # disjoint, and all images
    assert w_images is alpha_images
    assert np.array_equal(valid_half, alpha_half)
    assert valid_images.transform is w_images.plain_transform
    counts = [np.bincount(np.asarray(w_images.labels)[half]) for half in (w_half, alpha_half)]
    assert (abs(counts[0] - counts[1]) <= 1).all()  # of each class
    w_loader, alpha_loader, w_optim, alpha_optim, weights, alphas = batches
    first = [next(loader.epoch(1)) for loader in (w_loader, alpha_loader)]
    assert not torch.equal(first[0][0], first[1][0])
    for optim, parameters in ((w_optim, weights), (alpha_optim, alphas)):
        assert {id(p) for group in optim.param_groups for p in group["params"]} == set(map(id, parameters))
