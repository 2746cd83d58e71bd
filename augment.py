"""Train a found cell from scratch: the evaluation of DARTS (Liu et al., arXiv:1806.09055, section 3.2).

python augment.py --dataset cifar10 --genotype DARTS_V2                  # the paper's protocol
python augment.py --dataset cifar10 --genotype runs/search/cifar10       # the cell that a search found
python augment.py --genotype "Genotype(normal=[[('sep_conv_3x3', 0), ...]], ...)"
python augment.py --evaluate runs/augment/cifar10                        # its accuracy, by class too
python augment.py --gpus all ...                                         # on all GPUs of this machine
torchrun --nproc-per-node 8 augment.py ...                               # the same, and over several machines
python augment.py --resume runs/augment/cifar10                          # go on with an interrupted run
"""

import torch
from torch import nn

from config import AugmentConfig
from genotypes import from_str, resolve
from models.augment_cnn import AugmentCNN
from models.sync_bn import synchronise
from preproc import preprocessing
from running import ranks
from running.costs import cost, describe, describe_latency
from running.errors import user_errors_in_one_line
from running.evaluation import evaluate, load_trained, start_from
from running.loading import Loader
from running.run import Meters, one_line, open_run, seed_generators
from utils import cosine_lr, exponential_lr, get_data, objects_that_stay, param_size


def main():
    config = ranks.first(AugmentConfig)
    if config.evaluate:
        if ranks.size() > 1:
            raise ranks.user_error("--evaluate takes one process; leave torchrun out")
        return ranks.first(lambda: print_accuracy(config))
    genotype = ranks.first(lambda: resolve(config.genotype))
    config.genotype = str(genotype)  # a folder may change; the run's configuration must not
    if config.gpus:
        ranks.launch(config.gpus, __file__)
    run = open_run(config)
    device = run.device

    size, channels, n_classes, trn_data, val_data = ranks.in_turn(lambda: get_data(
        config.dataset, config.data_path, config.cutout_length, validation=True,
        image_size=config.image_size, image_channels=config.image_channels, seed=config.seed,
        skip_bad_images=config.skip_bad_images, crops=config.stem == "imagenet",
    ))  # fmt: skip
    if config.aux_weight > 0 and config.batch_size < 2:
        raise ranks.user_error("--batch-size must be at least 2 with an auxiliary head, whose BN sees a pixel an image")
    if config.stem == "imagenet" and (size < 64 or config.init_channels < 2):
        raise ranks.user_error(
            "--stem imagenet needs images of at least 64 pixels a side and --init-channels of at least 2, not "
            f"{size} and {config.init_channels}"
        )
    loading = {"batch_size": config.batch_size, "device": device, "workers": config.workers, "seed": config.seed}
    trn_loader = Loader(trn_data, range(len(trn_data)), **loading)
    val_loader = Loader(val_data, range(len(val_data)), shuffle=False, **loading)

    seed_generators(config.seed)
    net = AugmentCNN(
        size, channels, config.init_channels, n_classes, config.layers, config.aux_weight > 0, genotype,
        stem=config.stem,
    )  # fmt: skip
    net = net.to(device, memory_format=torch.channels_last)
    if config.init_checkpoint and not ranks.first(run.has_checkpoint):
        checkpoint = ranks.first(lambda: load_trained(config.init_checkpoint))
        if from_str(checkpoint["config"]["genotype"]) != genotype:
            raise ranks.user_error("--init-checkpoint is of another network: its genotype is another")
        start_from(net, checkpoint)
    costs = describe(cost(net, channels, size))
    latency = ranks.first(lambda: describe_latency(net, channels, size))
    if config.sync_bn:
        synchronise(net)
    trained = ranks.data_parallel(net, device)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optim = torch.optim.SGD(
        net.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )

    keeps = {"net": net, "optim": optim}
    about = {"genotype": config.genotype, "input_size": size, "input_channels": channels}
    about["preprocessing"] = preprocessing(config.dataset, size, config.stem == "imagenet")
    about |= {"classes": val_data.class_names(n_classes)} | dict(zip(("mean", "std"), val_data.normalisation()))
    with run.interruptible(), objects_that_stay():
        run.start(keeps, top1=0.0, best_top1=0.0, **about)
        results = run.results
        if config.lr_decay:
            scheduler = exponential_lr(optim, config.lr_decay, run.epoch)
        else:
            scheduler = cosine_lr(optim, config.epochs, done=run.epoch)
        run.log(
            f"{len(trn_data)} training and {len(val_data)} test images of {channels} x {size} x {size}, {n_classes} "
            f"classes; {param_size(net):.3f} M parameters without the auxiliary head; in training "
            f"{one_line(trn_data.transform)}"
        )
        run.log(f"the network: {costs}; a forward pass takes {latency}")

        for epoch in range(run.epoch + 1, config.epochs + 1):
            net.drop_path_prob(config.drop_path_prob * (epoch - 1) / config.epochs)  # 0 in the first epoch
            if not run.trained:
                train(epoch, run, trained, net, criterion, trn_loader, optim)
            top1 = validate(epoch, run, net, nn.CrossEntropyLoss(), val_loader)
            scheduler.step()
            is_best = epoch == 1 or top1 > results["best_top1"]
            results |= {"top1": top1, "best_top1": max(top1, results["best_top1"])}
            run.end_epoch(is_best)

    top1 = results["top1"]
    run.finish(
        epochs=config.epochs, test_top1=top1, test_error=1 - top1, best_test_top1=results["best_top1"],
        parameters_M=param_size(net),
    )  # fmt: skip


def print_accuracy(config):
    """The accuracy of a trained network, overall and by class."""
    data_path = None if config.data_path == config.build_parser().get_default("data_path") else config.data_path
    found = evaluate(config.evaluate, data_path, config.batch_size, config.workers, config.device, config.mirror)
    confusion = found.confusion()
    print(f"{found.checkpoint}: top 1 {found.top1:.2%} of {len(found.labels)} test images")
    for name, row, hits in zip(found.names, confusion, confusion.diagonal()):
        print(f"{hits / max(row.sum(), 1):8.2%} of {row.sum():5}  {name}")


def train(epoch, run, trained, net, criterion, loader, optim):
    """One epoch: the loss, and the auxiliary head's by its weight. trained: the net, or on several ranks its DDP."""
    config = run.config
    meters = Meters(run, f"epoch {epoch}/{config.epochs}  train", training=True)

    net.train()
    parameters = list(net.parameters())
    for X, y, n in meters.watch(loader.epoch(epoch, meters.first), len(loader)):
        net.shared_batch(n, ranks.rows(n))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
            logits, aux_logits = trained(X)
            loss = objective = criterion(logits, y)
            if aux_logits is not None:
                objective = loss + config.aux_weight * criterion(aux_logits, y)
        optim.zero_grad()
        (objective * ranks.ddp_weight(n)).backward()
        if not config.sync_bn:
            ranks.average_statistics(net, y)
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        (objective,) = ranks.average([ranks.row_weighted(objective.detach(), y)], y)
        run.stop_unless_finite("w", objective, norm, optim.param_groups[0]["lr"], epoch, {"w": loader.samples})
        optim.step()

        run.step += 1
        meters.update(loss.detach(), logits.detach(), y, n)
        meters.scalars("step", "val")
        run.scalar("lr/w", optim.param_groups[0]["lr"])

    meters.finish("train", f"lr {optim.param_groups[0]['lr']:.5f}  ")
    run.scalar("epoch", epoch)
    run.scalar("speed/steps_per_second", 1 / meters.seconds_a_step)
    run.after_training(meters, len(loader))


@torch.no_grad()
def validate(epoch, run, net, criterion, loader):
    """Loss and accuracy on the test images; returns top 1 as a fraction."""
    meters = Meters(run, f"epoch {epoch}/{run.config.epochs}  test")
    net.eval()
    for X, y, n in meters.watch(loader.epoch(epoch), len(loader)):
        logits, _ = net(X)
        meters.update(criterion(logits, y), logits, y, n)
    meters.finish("test")
    return meters.top1.avg


if __name__ == "__main__":
    with user_errors_in_one_line("augment.py"), ranks.group():
        main()
