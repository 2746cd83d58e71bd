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

from command_line.errors import end_silently_on_interrupt, one_line, shell_quote, user_errors_in_one_line

if __name__ == "__main__":
    end_silently_on_interrupt()

from config import SearchConfig

if __name__ == "__main__":
    SearchConfig.answer_help()  # at once: `import torch` takes seconds

import shutil

import numpy as np
import torch
from torch import nn

from architect import Architect
from evidence import search_state
from evidence.curvature import dominant_eigenvalue, images_within
from genotypes import as_lists, from_str
from images.data_sets import stratified_split
from images.loading import Loader, check_unchanged, mix
from machine import ranks
from machine.cuda_graphs import StepGraphs
from machine.devices import seed_generators
from models.search_cnn import SearchCNN
from models.sync_bn import synchronise
from report import search_log
from report.cells import HOW_TO_INSTALL
from run.finite import Undo, check_finite, check_finite_mean
from run.folder import write_json
from run.progress import Meters
from run.run import Run
from utils import cosine_lr, garbage_collection_of_new_objects, get_data, param_size
from variants import compose


def main(network=SearchCNN, architect=Architect):
    """Run the search that the command line describes.

    network, architect: the classes to use; a script of yours gives subclasses of these.
    """
    with user_errors_in_one_line("search.py"), ranks.group():
        search(network, architect)


def search(network, architect):
    config = ranks.on_rank_0(SearchConfig)
    if config.gpus:
        ranks.launch(config.gpus)
    network, architect = compose(config, network, architect)
    run = Run(config)
    saved = run.saved_results()

    # the training set in two halves: w learns on one, alpha on the other
    size, channels, n_classes, data = ranks.in_turn(lambda: load_data(config, saved))
    w_half, alpha_half = stratified_split(data.labels, every=2, seed=config.seed)
    n_ops = config.nodes * (config.nodes + 3) // 2 * len(config.primitives)
    run.check_memory(n_ops, size, len(w_half))
    options = {"batch_size": config.batch_size, "device": run.device, "workers": config.workers}
    trn_loader = Loader(data, w_half, seed=config.seed, **options)
    val_loader = Loader(data, alpha_half, seed=mix(config.seed, 1), **options)
    eval_loader = Loader(data.without_augmentation(), alpha_half, shuffle=False, **options)
    curvature_images = np.random.default_rng(config.seed).permutation(alpha_half)[
        : images_within(config.eigenvalue_images, size)
    ]

    seed_generators(config.seed)
    net, w_optim, alpha_optim = build(network, config, run.device, channels, n_classes)
    bilevel = architect(net, config.w_momentum, config.w_weight_decay, config.eps_scale)

    state = {"net": net, "w_optim": w_optim, "alpha_optim": alpha_optim}
    with run.interruptible(), garbage_collection_of_new_objects():
        results = {"found": {}, "history": [], "data": {"training": data.fingerprint()}}
        results = run.start(state, results, network=network, architect=architect)
        genotypes, history = results["found"], results["history"]
        scheduler = cosine_lr(w_optim, config.epochs, config.w_lr_min, done=run.epoch)
        graphs = StepGraphs(run, net, bilevel)
        run.log(
            f"{len(data)} images of {channels} x {size} x {size}, {n_classes} classes: {len(w_half)} for w, "
            f"{len(alpha_half)} for alpha; {param_size(net):.3f} M parameters; in training "
            f"{one_line(str(data.transform))}"
        )
        run.log(f"images of each class: {data.describe_classes()}")
        if shutil.which("dot") is None:
            run.log(f"cells are kept as graphviz sources in {run.folder.plots}; {HOW_TO_INSTALL}")

        for epoch in range(run.epoch + 1, config.epochs + 1):
            if config.early_stop and search_state.early_stop(history):
                break
            net.begin_epoch(epoch, config.epochs)
            if not run.position["trained"]:
                train(epoch, run, net, bilevel, trn_loader, val_loader, w_optim, alpha_optim, scheduler, graphs)
            top1 = validate(epoch, run, net, eval_loader)
            scheduler.step()
            now = {"epoch": epoch, "valid_top1": top1, "string": str(net.genotype())}
            history.append(now | state_of(net, data.without_augmentation(), curvature_images, run.device))
            is_best = "best" not in genotypes or top1 > genotypes["best"]["valid_top1"]
            chosen = search_state.chosen(history, config.early_stop)
            genotypes = {"last": {name: chosen[name] for name in now}, "best": now if is_best else genotypes["best"]}
            if ranks.rank() == 0:
                search_log.show(epoch, run, net, history)
                save_genotypes(run, genotypes, history)
            run.end_epoch(is_best, results | {"found": genotypes, "history": history})
            run.stop_if_asked()

    finish(run, genotypes, history, size, channels, n_classes)


def load_data(config, saved):
    """[size, channels, n_classes, training images].

    saved: results of the run to resume, or None. Raises UserError where its images were others.
    """
    data = get_data(
        config.dataset,
        config.data_path,
        cutout_length=0,
        validation=False,
        image_size=config.image_size,
        image_channels=config.image_channels,
        seed=config.seed,
        resize=config.resize,
        augmentation=config.augmentation,
        skip_bad_images=config.skip_bad_images,
    )
    check_unchanged({"training": data[3]}, saved or {})
    return data


def build(network, config, device, channels, n_classes):
    """The network of these options, the optimizer of its weights and that of its alphas."""
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
    )
    net = net.to(device, memory_format=torch.channels_last)
    if config.sync_bn:
        synchronise(net)
    w_optim = torch.optim.SGD(
        net.weights(), config.w_lr, momentum=config.w_momentum, weight_decay=config.w_weight_decay, fused=True
    )
    alpha_optim = torch.optim.Adam(
        net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=config.alpha_weight_decay
    )
    return net, w_optim, alpha_optim


def train(epoch, run, net, architect, trn_loader, val_loader, w_optim, alpha_optim, scheduler, graphs=None):
    """One epoch of Algorithm 1: alpha descends L_V through a virtual step of w, then w descends L_T."""
    config, graphs = run.config, graphs or StepGraphs(run, net, architect)
    xi = scheduler.get_last_lr()[0] if config.order == "second" else 0.0  # of eq. 6; w's learning rate, or first order
    weights, alphas = list(net.weights()), list(net.alphas())
    loaders = {"w": trn_loader, "alpha": val_loader}
    n_steps = min(len(trn_loader), len(val_loader))
    meters = Meters(run, f"epoch {epoch}/{config.epochs}  train", n_steps, run.position)
    mixed_precision = torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp)

    net.train()
    batches = zip(trn_loader.epoch(epoch, meters.steps_done), val_loader.epoch(epoch, meters.steps_done))
    for (trn_X, trn_y, n), (val_X, val_y, _) in batches:
        # one draw for all passes of the step: else eq. 7 divides the difference of two draws by 2 eps
        net.noise = net.draw_noise()

        of_alpha, undo = (), None  # alpha's loss and gradient norm, and how to take back its step
        # alpha: a step by the gradient of L_V(w', alpha), eq. 6 and 7
        if net.alphas_learn:
            with mixed_precision:
                val_loss = graphs.run(
                    architect.unrolled_backward, inputs=(trn_X, trn_y, val_X, val_y), fixed=(xi, w_optim), fills=alphas
                )
            of_alpha = val_loss, nn.utils.get_total_norm([alpha.grad for alpha in alphas])
            undo = Undo(alpha_optim)
            alpha_optim.step()

        # w: a step by the gradient of L_T(w, alpha), at the new alpha
        w_optim.zero_grad()
        logits, loss = graphs.run(
            w_gradient, inputs=(trn_X, trn_y), fixed=(net, weights, mixed_precision), fills=weights
        )
        trn_loss = ranks.average_step(loss, net, weights, trn_y, config.sync_bn)
        w_norm = nn.utils.clip_grad_norm_(weights, config.w_grad_clip)
        # all that the step has computed is read here, since reading waits for the device
        w_norm, *of_alpha = meters.update(trn_loss, logits, trn_y, n, others=(w_norm, *of_alpha))
        if net.alphas_learn:
            check_finite(run, "alpha", *of_alpha, alpha_optim, loaders, undo)
        check_finite(run, "w", meters.loss.val, w_norm, w_optim, loaders, undo)
        w_optim.step()

        run.step += 1
        meters.write_scalars("step", "val")
        if net.alphas_learn:
            run.scalar("step/alpha_loss", of_alpha[0])
        run.scalar("lr/w", w_optim.param_groups[0]["lr"])
        run.scalar("lr/alpha", alpha_optim.param_groups[0]["lr"])
        meters.show()
        if meters.steps_done < n_steps:  # the last step is saved with the lines of the epoch's end, below
            run.note_position(meters)
            run.save_if_due()
            run.stop_if_asked()

    graphs.forget()
    meters.finish("train", f"w_lr {w_optim.param_groups[0]['lr']:.5f}  ")
    run.scalar("epoch", epoch)
    run.scalar("speed/steps_per_second", 1 / meters.seconds_per_step())
    run.note_position(meters)
    run.save_if_due()
    run.stop_if_asked()


def w_gradient(X, y, net, weights, mixed_precision):
    """Set the weights' gradients of L_T(w, alpha) at a batch, on several ranks row-weighted. Returns (logits, loss)."""
    with mixed_precision:
        logits = net(X)
        loss = net.criterion(logits, y)
    ranks.row_weighted(loss, y).backward(inputs=weights)
    return logits.detach(), loss.detach()


@torch.no_grad()
def validate(epoch, run, net, loader):
    """Loss and accuracy on the alphas' half, without augmentation; returns top 1 as a fraction."""
    meters = Meters(run, f"epoch {epoch}/{run.config.epochs}  valid", len(loader))
    net.eval()
    for X, y, n in loader.epoch(epoch):
        logits = net(X)
        meters.update(net.criterion(logits, y), logits, y, n)
        meters.show()
        run.save_if_due()
        run.stop_if_asked()
    check_finite_mean(run, "valid", meters.loss.avg)
    meters.finish("valid")
    return meters.top1.avg


@torch.no_grad()
def state_of(net, images, samples, device):
    """What `search_state` reads of an epoch beside the genotype.

    images, samples: `Images`, and which of them the eigenvalue is computed on, by rank 0 alone; none: no eigenvalue.
    """

    def eigenvalue():
        if len(samples) == 0:
            return None
        X, y = zip(*(images[sample] for sample in samples.tolist()))
        X = torch.stack(X).to(device, memory_format=torch.channels_last)
        with torch.enable_grad():
            return dominant_eigenvalue(net, X, torch.tensor(y, device=device))

    genotype, weights = net.genotype(), net.edge_weights()
    margins = {
        kind: search_state.margins([node.tolist() for node in weights[kind]], getattr(genotype, kind), net.primitives)
        for kind in weights
    }
    return {"eigenvalue": ranks.on_rank_0(eigenvalue), "margins": margins, "alphas_learn": net.alphas_learn}


def save_genotypes(run, genotypes, history):
    """Write history.json, and genotype.json with each genotype as a string and as lists."""
    with run.surviving_full_disk(run.folder.history.name):
        write_json(run.folder.history, history)
    with run.surviving_full_disk(run.folder.genotype.name):
        forms = {which: entry | as_lists(from_str(entry["string"])) for which, entry in genotypes.items()}
        write_json(run.folder.genotype, forms)


def finish(run, genotypes, history, size, channels, n_classes):
    """Write the summary, the command that trains the cell, and what its network costs."""
    last, best, stop = genotypes["last"], genotypes["best"], search_state.early_stop(history)
    genotype = from_str(last["string"])
    run.finish(
        epochs=history[-1]["epoch"],
        valid_top1=last["valid_top1"],
        best_valid_top1=best["valid_top1"],
        best_epoch=best["epoch"],
        verdict=search_state.verdict(history),
        eigenvalue=history[-1].get("eigenvalue"),
        skip_connections_normal=search_state.skip_connections(genotype.normal),
        skip_connections_reduce=search_state.skip_connections(genotype.reduce),
        stable_epochs=search_state.stable_epochs(history),
        early_stop_epoch=stop if run.config.early_stop else None,
        genotype_epoch=last["epoch"],
        genotype=last["string"],
    )
    if ranks.rank() == 0:
        command = f"python augment.py {run.config.data_options()} --genotype {shell_quote(last['string'])}"
        run.log(f"train the cell: {command}")
        search_log.show_cost(run, genotype, size, channels, n_classes)
        print(command)  # again, as the last line


if __name__ == "__main__":
    main()
