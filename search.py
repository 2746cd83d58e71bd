"""Search for a cell: Algorithm 1 of DARTS (Liu et al., arXiv:1806.09055).

python search.py --dataset cifar10                                       # the paper's protocol, second order
python search.py --dataset cifar10 --order first                         # first order: faster, a little worse
python search.py                                                         # embedded data: scikit-learn's digits
python search.py --dataset folder --data-path DIR --image-size 32        # your images, DIR/train/CLASS/*
python search.py --gpus all                                              # on all GPUs of this machine
torchrun --nproc-per-node 8 search.py                                    # the same, and over several machines
python search.py --resume runs/search/cifar10                            # go on with an interrupted run
"""

import torch
from torch import nn

from architect import Architect
from config import AugmentConfig, SearchConfig
from genotypes import GENOTYPE_FILE, PRIMITIVES, as_lists, from_str
from models.augment_cnn import AugmentCNN
from models.search_cnn import SearchCNN, softmax
from models.sync_bn import synchronise
from running import ranks
from running.costs import cost, describe, describe_latency
from running.data_sets import stratified_split
from running.errors import user_errors_in_one_line
from running.loading import Loader, mix
from running.run import HISTORY, Meters, alpha_tag, one_line, open_run, quote, seed_generators
from utils import cosine_lr, get_data, objects_that_stay, param_size


def main():
    config = ranks.first(SearchConfig)
    if config.gpus:
        ranks.launch(config.gpus, __file__)
    run = open_run(config)
    device = run.device

    # the training set in two halves: w learns on one, alpha on the other
    size, channels, n_classes, data = ranks.in_turn(lambda: get_data(
        config.dataset, config.data_path, cutout_length=0, validation=False,
        image_size=config.image_size, image_channels=config.image_channels, seed=config.seed,
        skip_bad_images=config.skip_bad_images,
    ))  # fmt: skip
    w_half, alpha_half = stratified_split(data.labels, every=2, seed=config.seed)
    loading = {"batch_size": config.batch_size, "device": device, "workers": config.workers, "seed": config.seed}
    trn_loader = Loader(data, w_half, **loading)
    val_loader = Loader(data, alpha_half, **loading | {"seed": mix(config.seed, 1)})
    eval_loader = Loader(data.without_augmentation(), alpha_half, shuffle=False, **loading)

    seed_generators(config.seed)
    net = SearchCNN(
        channels, config.init_channels, n_classes, config.layers, nn.CrossEntropyLoss(), config.nodes,
        execution=config.execution, recompute=config.recompute,
    )  # fmt: skip
    net = net.to(device, memory_format=torch.channels_last)
    if config.sync_bn:
        synchronise(net)
    w_optim = torch.optim.SGD(
        net.weights(), config.w_lr, momentum=config.w_momentum, weight_decay=config.w_weight_decay, fused=True
    )
    alpha_optim = torch.optim.Adam(
        net.alphas(), config.alpha_lr, betas=(0.5, 0.999), weight_decay=config.alpha_weight_decay
    )
    architect = Architect(net, config.w_momentum, config.w_weight_decay)

    keeps = {"net": net, "w_optim": w_optim, "alpha_optim": alpha_optim}
    with run.interruptible(), objects_that_stay():
        run.start(keeps, found={}, history=[])
        found, history = run.results["found"], run.results["history"]
        scheduler = cosine_lr(w_optim, config.epochs, config.w_lr_min, run.epoch)
        chart_edges(run, config.nodes)
        run.log(
            f"{len(data)} images of {channels} x {size} x {size}, {n_classes} classes: {len(w_half)} for w, "
            f"{len(alpha_half)} for alpha; {param_size(net):.3f} M parameters; in training {one_line(data.transform)}"
        )

        for epoch in range(run.epoch + 1, config.epochs + 1):
            if not run.trained:
                train(epoch, run, net, architect, trn_loader, val_loader, w_optim, alpha_optim, scheduler)
            top1 = validate(epoch, run, net, eval_loader)
            scheduler.step()
            found["last"] = {"epoch": epoch, "valid_top1": top1, "string": str(net.genotype())}
            history.append(found["last"])
            is_best = "best" not in found or top1 > found["best"]["valid_top1"]
            if is_best:
                found["best"] = found["last"]
            show(epoch, run, net, found, history)
            run.end_epoch(is_best)

    last, best = found["last"], found["best"]
    run.finish(
        epochs=last["epoch"], valid_top1=last["valid_top1"], best_valid_top1=best["valid_top1"],
        best_epoch=best["epoch"], genotype=last["string"],
    )  # fmt: skip
    if ranks.rank() == 0:
        show_cost(run, from_str(last["string"]), size, channels, n_classes)
    run.log("train what was found:")
    if ranks.rank() == 0:
        print(f"python augment.py {config.data_options()} --genotype {quote(last['string'])}")


def train(epoch, run, net, architect, trn_loader, val_loader, w_optim, alpha_optim, scheduler):
    """One epoch of Algorithm 1: alpha descends L_V through a virtual step of w, then w descends L_T."""
    config = run.config
    xi = scheduler.get_last_lr()[0] if config.order == "second" else 0.0
    weights = list(net.weights())
    meters = Meters(run, f"epoch {epoch}/{config.epochs}  train", training=True)
    steps = min(len(trn_loader), len(val_loader))

    def stop_unless_finite(phase, loss, gradient_norm):
        optim = alpha_optim if phase == "alpha" else w_optim
        batch = {"w": trn_loader.samples, "alpha": val_loader.samples}
        run.stop_unless_finite(phase, loss, gradient_norm, optim.param_groups[0]["lr"], epoch, batch)

    net.train()
    batches = zip(trn_loader.epoch(epoch, meters.first), val_loader.epoch(epoch, meters.first))
    for (trn_X, trn_y, n), (val_X, val_y, _) in meters.watch(batches, steps):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
            val_loss = architect.unrolled_backward(trn_X, trn_y, val_X, val_y, xi, w_optim)
        stop_unless_finite("alpha", val_loss, norm([alpha.grad for alpha in architect.alphas]))
        alpha_optim.step()

        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
            logits = net(trn_X)
            loss = net.criterion(logits, trn_y)
        w_optim.zero_grad()
        ranks.row_weighted(loss, trn_y).backward(inputs=weights)
        loss = of_all_ranks(loss.detach(), net, weights, trn_y, config.sync_bn)
        stop_unless_finite("w", loss, nn.utils.clip_grad_norm_(weights, config.w_grad_clip))
        w_optim.step()

        run.step += 1
        meters.update(loss, logits.detach(), trn_y, n)
        meters.scalars("step", "val")
        run.scalar("step/alpha_loss", val_loss.item())
        run.scalar("lr/w", w_optim.param_groups[0]["lr"])
        run.scalar("lr/alpha", alpha_optim.param_groups[0]["lr"])

    meters.finish("train", f"w_lr {w_optim.param_groups[0]['lr']:.5f}  ")
    run.scalar("epoch", epoch)
    run.scalar("speed/steps_per_second", 1 / meters.seconds_a_step)
    run.after_training(meters, steps)


def of_all_ranks(loss, net, weights, y, sync_bn):
    """The global batch's loss; and gives every rank its gradient and the mean of BN's running statistics."""
    loss, *grads = ranks.average([ranks.row_weighted(loss, y), *(w.grad for w in weights)], y)
    for w, grad in zip(weights, grads):
        w.grad = grad
    if not sync_bn:
        ranks.average_statistics(net, y)
    return loss


@torch.no_grad()
def validate(epoch, run, net, loader):
    """Loss and accuracy on the alphas' half, without augmentation; returns top 1 as a fraction."""
    meters = Meters(run, f"epoch {epoch}/{run.config.epochs}  valid")
    net.eval()
    for X, y, n in meters.watch(loader.epoch(epoch), len(loader)):
        logits = net(X)
        meters.update(net.criterion(logits, y), logits, y, n)
    meters.finish("valid")
    return meters.top1.avg


def show_cost(run, genotype, size, channels, n_classes):
    """What the network costs that augment.py makes of a genotype, in the log."""
    default = AugmentConfig(["--genotype", str(genotype)])
    with run.device:
        net = AugmentCNN(size, channels, default.init_channels, n_classes, default.layers, False, genotype)
    run.log(f"the network that augment.py makes of it: {describe(cost(net, channels, size))}")
    net = net.to(memory_format=torch.channels_last)
    run.log(f"a forward pass takes {describe_latency(net, channels, size)}")


def chart_edges(run, n_nodes):
    """One chart for each edge, with a line for each operation, under TensorBoard's Custom Scalars."""
    edges = [(node, source) for node in range(n_nodes) for source in range(node + 2)]
    run.tensorboard.add_custom_scalars(
        {
            f"alpha_{kind}": {
                f"node {node} from {source}": ["Multiline", [alpha_tag(kind, node, source, op) for op in PRIMITIVES]]
                for node, source in edges
            }
            for kind in ("normal", "reduce")
        }
    )


def norm(tensors):
    """The Euclidean norm of all of them together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def cell_in_words(kind, gene, alpha):
    """A line for each node of a cell: the operations chosen, where from, and their softmax weights."""
    names = {0: "c_{k-2}", 1: "c_{k-1}"}
    for i, (edges, weights) in enumerate(zip(gene, softmax(alpha))):
        chosen = [(op, source, weights[source, PRIMITIVES.index(op)]) for op, source in edges]
        terms = (f"{op:>12} of {names.get(source, f'node {source - 2}')} ({100 * w:.2f} %)" for op, source, w in chosen)
        yield f"{kind:>6} node {i} =  " + "  + ".join(terms)


def show(epoch, run, net, found, history):
    """The state of the search: softmax weights and genotype in the log, TensorBoard, pictures and genotype.json."""
    genotype = net.genotype()
    for kind, alpha in (("normal", net.alpha_normal), ("reduce", net.alpha_reduce)):
        run.log(f"softmax of alpha_{kind}, %:  " + "  ".join(PRIMITIVES))
        for i, edges in enumerate(softmax(alpha)):
            for source, row in enumerate(edges.tolist()):
                columns = (f"{100 * w:{len(op)}.2f}" for op, w in zip(PRIMITIVES, row))
                run.log(f"node {i} from {source}".rjust(25) + ":  " + "  ".join(columns))
                for op, w in zip(PRIMITIVES, row):
                    run.scalar(alpha_tag(kind, i, source, op), w)
        for line in cell_in_words(kind, getattr(genotype, kind), alpha):
            run.log(line)
        run.draw(getattr(genotype, kind), f"epoch{epoch:03d}-{kind}", f"cell/{kind}", f"{kind} cell, epoch {epoch}")
    run.log(f"genotype = {genotype}")
    with run.losing_only(GENOTYPE_FILE):
        run.write_json(HISTORY, history)
        run.write_json(GENOTYPE_FILE, {which: of | as_lists(from_str(of["string"])) for which, of in found.items()})


if __name__ == "__main__":
    with user_errors_in_one_line("search.py"), ranks.group():
        main()
