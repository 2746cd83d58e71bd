"""The training loops of both scripts on batches in a list."""

import torch
from conftest import Batches, batch

import augment
import search
from architect import Architect
from config import SearchConfig
from models.sync_bn import synchronise
from run.run import Run
from utils import cosine_lr


def search_epoch(config, net, batches, fused=False, architect=Architect, log=print):
    """A function that takes the steps of an epoch as search.py does.

    fused: of Adam, whose count of steps, which search.py has on the CPU, is then not read.
    """
    if config.sync_bn:
        synchronise(net)
    w_optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    alpha_optim = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), foreach=not fused, fused=fused)
    run, architect = Run(config), architect(net, 0.9, 3e-4)
    run.log = log
    return lambda: search.train(1, run, net, architect, batches, batches, w_optim, alpha_optim, cosine_lr(w_optim, 50))


def augment_epoch(config, net, batches):
    optim = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    if config.sync_bn:
        synchronise(net)
    return lambda: augment.train(1, Run(config), net, batches, optim)


def two_steps(net, architect=Architect):
    """Two steps of the search by the script's own loop; the alphas' gradients of the last."""
    trn, val = (Batches(batch(n=8, seed=seed + i) for i in range(2)) for seed in (10, 50))
    config = SearchConfig(["--w-lr", "0.1", "--alpha-lr", "0.01", "--device", "cpu", "--overwrite"])
    w_optim = architect.w_optimizer(net.weights(), config)
    alpha_optim = torch.optim.Adam(net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    search.train(1, Run(config), net, architect(net, 0.9, 3e-4), trn, val, w_optim, alpha_optim, cosine_lr(w_optim, 50))
    return [alpha.grad.clone() for alpha in net.alphas()]
