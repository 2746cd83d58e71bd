"""Search for a cell: Algorithm 1 of DARTS (Liu et al., arXiv:1806.09055).

python search.py --dataset cifar10                                       # the paper's protocol, second order
python search.py --dataset cifar10 --order first                         # first order: faster, a little worse
python search.py                                                         # embedded data: scikit-learn's digits
python search.py --dataset folder --data-path DIR --image-size 32        # your images, DIR/train/CLASS/*
python search.py --dataset cifar10 --variant pc-darts                    # a published variant: docs/variants.md
python search.py --gpus all                                              # on all GPUs of this machine
torchrun --nproc-per-node 8 search.py                                    # the same, and over several machines
python search.py --resume runs/search/cifar10                            # go on with an interrupted run
"""

from config import SearchConfig

if __name__ == "__main__":
    SearchConfig.answer_help()  # before torch is imported, which takes seconds

import functools
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from architect import Architect
from command_line.errors import one_line, shell_quote, user_errors_in_one_line
from evidence import search_state
from evidence.curvature import dominant_eigenvalue, images_within
from evidence.perturbation import select_by_perturbation
from genotypes import as_lists, describe_truth, from_str
from images.data_sets import stratified_split
from images.loading import Loader, mix
from machine import ranks
from machine.cuda_graphs import StepGraphs
from machine.devices import limit_threads, seed_generators
from models.search_cnn import SearchCNN
from models.spaces import SPACES
from models.sync_bn import synchronise
from report import search_log
from report.cells import HOW_TO_INSTALL
from run.folder import write_json
from run.loggers import Logger
from run.run import Run
from utils import cosine_lr, get_data, param_size
from variants import compose


def main(
    network: type[SearchCNN] = SearchCNN,
    architect: type[Architect] = Architect,
    loggers: Iterable[type[Logger]] = (),
    select: Callable[[SearchCNN, Loader, Loader], Any] | None = None,
):
    """Run the search that the command line describes.

    network, architect: the classes to use; your script may pass subclasses; loggers: classes of loggers
    besides TensorBoard's; select: how the genotype is chosen at the end, given the trained network and the loaders of
    the two halves of the training set, in the place of --select. docs/changing.md has an example of each.
    """
    with user_errors_in_one_line("search.py"), ranks.group():
        search(network, architect, loggers, select)


def search(network, architect_class, loggers, select):
    config = ranks.on_rank_0(SearchConfig)
    if config.gpus:
        ranks.launch(config.gpus)
    network, architect_class = compose(config, network, architect_class)
    run = Run(config, loggers)

    # the training set in two halves: w learns on one, alpha on the other
    size, channels, n_classes, data = ranks.in_turn(lambda: load_data(config))
    limit_threads(config.batch_size, size, config.init_channels)
    w_half, alpha_half = stratified_split(data.labels, every=2, seed=config.seed)
    options = {"batch_size": config.batch_size, "device": run.device, "workers": config.workers}
    w_loader = Loader(data, w_half, seed=config.seed, **options)
    alpha_loader = Loader(data, alpha_half, seed=mix(config.seed, 1), **options)
    eval_loader = Loader(data.without_augmentation(), alpha_half, shuffle=False, **options)
    eigenvalue_images = np.random.default_rng(config.seed).permutation(alpha_half)
    eigenvalue_images = eigenvalue_images[: images_within(config.eigenvalue_images, size)]

    seed_generators(config.seed)
    net, w_optim, alpha_optim = build(network, architect_class, config, run.device, channels, n_classes)
    architect = architect_class(net, config.w_momentum, config.w_weight_decay, config.eps_scale)

    with run.interruptible():
        parts = {"net": net, "w_optim": w_optim, "alpha_optim": alpha_optim}
        results = {"genotypes": {}, "history": [], "data": {"training": data.fingerprint()}}
        results = run.start(parts, results, network=network, architect=architect_class)
        genotypes, history = results["genotypes"], results["history"]
        scheduler = cosine_lr(w_optim, config.epochs, config.w_lr_min, done=run.epoch)
        graphs = StepGraphs(run, net, architect)
        log_start(run, net, data, w_half, alpha_half, size, channels, n_classes)

        for epoch in range(run.epoch + 1, config.epochs + 1):
            if config.early_stop and search_state.early_stop(history):
                break
            net.begin_epoch(epoch, config.epochs)
            net.alphas_learn = net.alphas_learn and config.alpha_lr > 0
            train(epoch, run, net, architect, w_loader, alpha_loader, w_optim, alpha_optim, scheduler, graphs)
            top1 = validate(epoch, run, net, eval_loader)
            scheduler.step()
            now = {"epoch": epoch, "valid_top1": top1, "string": str(net.genotype())}
            history.append(now | state_of(net, data.without_augmentation(), eigenvalue_images, run.device))
            is_best = "best" not in genotypes or top1 > genotypes["best"]["valid_top1"]
            chosen = search_state.chosen(history, config.early_stop)
            last = {name: chosen[name] for name in ("epoch", "valid_top1", "string")}
            genotypes = {"last": last, "best": now if is_best else genotypes["best"]}
            if ranks.rank() == 0:
                search_log.show(epoch, run, net, history)
                save_genotypes(run, genotypes, history)
            run.end_epoch(is_best, results | {"genotypes": genotypes, "history": history})

        if config.select == "perturbation":
            tune = functools.partial(tune_weights, run, net, architect, w_loader, w_optim)
            select = select or (lambda net, *loaders: select_by_perturbation(net, eval_loader, tune, config.seed))
        if select is not None:
            genotypes["last"]["string"] = str(select(net, w_loader, alpha_loader))
            ranks.on_rank_0(lambda: save_genotypes(run, genotypes, history))
    finish(run, genotypes, history, size, channels, n_classes)


def load_data(config):
    """[size, channels, n_classes, training images]."""
    return get_data(
        config.dataset,
        config.data_path,
        cutout_length=0,
        validation=False,
        seed=config.seed,
        augmentation=config.augmentation,
        **config.image_options(),
    )


def build(network, architect_class, config, device, channels, n_classes):
    """Build the network on the device, the optimizer of its weights and the optimizer of its alphas."""
    net = network(
        channels,
        config.init_channels,
        n_classes,
        config.layers,
        nn.CrossEntropyLoss(),
        config.nodes,
        execution=config.execution,
        recompute=config.recompute,
        primitives=config.primitives,
        space=SPACES[config.space],
    )
    net = net.to(device, memory_format=torch.channels_last)
    if config.sync_bn:
        synchronise(net)
    w_optim = architect_class.w_optimizer(net.weights(), config)
    alpha_optim = torch.optim.Adam(
        net.alphas(), config.alpha_lr, betas=tuple(config.alpha_betas), weight_decay=config.alpha_weight_decay
    )
    return net, w_optim, alpha_optim


def log_start(run, net, data, w_half, alpha_half, size, channels, n_classes):
    """Log the sizes of the images, halves and network before the first epoch."""
    search_log.chart_edges(run, net)
    run.log(
        f"{len(data)} images of {channels} x {size} x {size}, {n_classes} classes: {len(w_half)} for w, "
        f"{len(alpha_half)} for alpha; {param_size(net):.3f} M parameters; in training {one_line(str(data.transform))}"
    )
    run.log(f"images of each class: {data.describe_classes()}")
    if shutil.which("dot") is None:
        run.log(f"cells are kept as graphviz sources in {run.folder.plots}; {HOW_TO_INSTALL}")


def train(epoch, run, net, architect, w_loader, alpha_loader, w_optim, alpha_optim, scheduler, graphs=None):
    """One epoch of Algorithm 1: alpha descends L_V through a virtual step of w, then w descends L_T."""
    config, graphs = run.config, graphs or StepGraphs(run, net, architect)
    w_lr = scheduler.get_last_lr()[0]
    xi = w_lr if config.order == "second" else 0.0  # eq. 6's xi: w's learning rate, or 0 for first order
    weights, alphas = list(net.weights()), list(net.alphas())
    autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp)
    meters = run.training_pass(epoch, min(len(w_loader), len(alpha_loader)), {"w": w_optim, "alpha": alpha_optim})

    net.train()
    graphs.forget()  # what was recorded in the last epoch, with its learning rate
    batches = zip(w_loader.epoch(epoch, meters.steps_done), alpha_loader.epoch(epoch, meters.steps_done))
    for (w_X, w_y, n), (alpha_X, alpha_y, _) in batches:
        # all passes of a step share one random draw; otherwise eq. 7 measures the difference of two draws
        net.noise = net.draw_noise()

        # alpha: a step by the gradient of L_V(w', alpha), eq. 6 and 7
        alpha_numbers = {}
        if net.alphas_learn:
            with autocast:
                batch = w_X, w_y, alpha_X, alpha_y
                alpha_loss = graphs.run(architect.unrolled_backward, inputs=batch, fixed=(xi, w_optim), fills=alphas)
            alpha_norm = nn.utils.get_total_norm([alpha.grad for alpha in alphas])
            alpha_numbers = {"alpha_loss": alpha_loss, "alpha_gradient_norm": alpha_norm}
            alpha_optim.step()

        # w: a step by the gradient of L_T(w, alpha), at the new alpha
        w_optim.zero_grad()
        fixed = net, architect, weights, autocast
        logits, loss = graphs.run(w_backward, inputs=(w_X, w_y), fixed=fixed, fills=weights)
        loss = ranks.average_step(loss, net, weights, w_y, config.sync_bn)
        w_norm = nn.utils.clip_grad_norm_(weights, config.w_grad_clip)
        w_optim.step()

        run.end_step(meters, loss, logits, w_y, n, w_gradient_norm=w_norm, **alpha_numbers)


def w_backward(X, y, net, architect, weights, autocast):
    """Backward pass of L_T: fills every w.grad, weighted by this rank's rows. Returns (logits, loss)."""
    outputs = []
    with autocast, net.register_forward_hook(lambda net, inputs, logits: outputs.append(logits.detach())):
        loss = architect.w_objective(X, y)
    ranks.row_weighted(loss, y).backward(inputs=weights)
    return outputs[-1], loss.detach()


def tune_weights(run, net, architect, loader, w_optim):
    """Train w alone for --tune-epochs, at the last learning rate of the search."""
    weights = list(net.weights())
    for epoch in range(run.config.tune_epochs):
        net.train()
        for X, y, _ in loader.epoch(run.config.epochs + 1 + epoch):
            run.stop_if_asked()
            net.noise = net.draw_noise()
            w_optim.zero_grad()
            autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.amp)
            _, loss = w_backward(X, y, net, architect, weights, autocast)
            ranks.average_step(loss, net, weights, y, run.config.sync_bn)
            nn.utils.clip_grad_norm_(weights, run.config.w_grad_clip)
            w_optim.step()


@torch.no_grad()
def validate(epoch, run, net, loader):
    """Loss and accuracy on the alphas' half, without augmentation; returns top 1 as a fraction."""
    meters = run.validation_pass(epoch, len(loader), "valid")
    net.eval()
    for X, y, n in loader.epoch(epoch):
        logits = net(X)
        run.end_step(meters, net.criterion(logits, y), logits, y, n)
    return meters.top1.avg


@torch.no_grad()
def state_of(net, images, eigenvalue_images, device):
    """The numbers of an epoch that `search_state` needs besides the genotype.

    eigenvalue_images: indices of the `images` on which rank 0 computes the eigenvalue. If there are none, no eigenvalue
    is computed.
    """

    def eigenvalue():
        if len(eigenvalue_images) == 0:
            return None
        X, y = zip(*(images[i] for i in eigenvalue_images.tolist()))
        X = torch.stack(X).to(device, memory_format=torch.channels_last)
        with torch.enable_grad():
            return dominant_eigenvalue(net, X, torch.tensor(y, device=device))

    genotype, weights = net.genotype(), net.edge_weights()
    margins = {
        kind: search_state.margins(
            [node.tolist() for node in nodes],
            getattr(genotype, kind),
            net.primitives,
            net.space.choosable(net.primitives),
        )
        for kind, nodes in weights.items()
    }
    return {
        "eigenvalue": ranks.on_rank_0(eigenvalue),
        "margins": margins,
        "alphas_learn": net.alphas_learn,
        "truth": net.space.truth(genotype),
    }


def save_genotypes(run, genotypes, history):
    """Write history.json, and genotype.json with each genotype as a string and as lists."""
    write_json(run.folder.history, history)
    content = {which: entry | as_lists(from_str(entry["string"])) for which, entry in genotypes.items()}
    write_json(run.folder.genotype, content)


def finish(run, genotypes, history, size, channels, n_classes):
    """Write the summary, the command that trains the cell, and what its network costs."""
    last, best, stop = genotypes["last"], genotypes["best"], search_state.early_stop(history)
    genotype = from_str(last["string"])
    space = SPACES[run.config.space]
    truth = space.truth(genotype) or {}
    run.log(f"the result is genotype = {genotype}" + (f"; {describe_truth(truth)}" if truth else ""))
    run.finish(
        epochs=history[-1]["epoch"],
        valid_top1=last["valid_top1"],
        best_valid_top1=best["valid_top1"],
        best_epoch=best["epoch"],
        verdict=search_state.verdict(history),
        eigenvalue=history[-1].get("eigenvalue"),
        **{f"skip_connections_{kind}": search_state.skip_connections(getattr(genotype, kind)) for kind in space.kinds},
        stable_epochs=search_state.stable_epochs(history),
        early_stop_epoch=stop if run.config.early_stop else None,
        genotype_epoch=last["epoch"],
        genotype=last["string"],
        **{f"published_{name}": value for name, value in truth.items()},
    )
    if ranks.rank() == 0:
        command = f"python augment.py {run.config.data_options()} --genotype {shell_quote(last['string'])}"
        run.log(f"train the cell: {command}")
        search_log.show_cost(run, genotype, size, channels, n_classes)
        print(command)  # again, as the last line


if __name__ == "__main__":
    main()
