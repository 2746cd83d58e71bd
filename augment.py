"""Train the network of a genotype from scratch: architecture evaluation (DARTS, arXiv:1806.09055, section 3.2).

python augment.py --dataset cifar10 --genotype DARTS_V2                  # the paper's protocol
python augment.py --dataset cifar10 --genotype runs/search/cifar10       # the last cell of a search
python augment.py --dataset cifar10 --genotype random:1                  # a random cell, to compare with
python augment.py --dataset cifar10 --genotype DARTS_V2 --hold-out 0.1   # accuracy on a tenth of the training images
python augment.py --genotype "Genotype(normal=[[('sep_conv_3x3', 0), ...]], ...)"
python augment.py --evaluate runs/augment/cifar10                        # its accuracy, by class too
python augment.py --evaluate runs/augment/cifar10 --predict FOLDER       # the classes of the images in a folder, as CSV
python augment.py --gpus all ...                                         # on all GPUs of this machine
torchrun --nproc-per-node 8 augment.py ...                               # the same, and over several machines
python augment.py --resume runs/augment/cifar10                          # go on with an interrupted run
"""

from config import AugmentConfig

if __name__ == "__main__":
    AugmentConfig.answer_help()  # before torch is imported, which takes seconds

import csv
import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from command_line.errors import UserError, one_line, user_errors_in_one_line
from genotypes import resolve
from images.loading import Loader
from machine import ranks
from machine.devices import limit_threads, seed_generators
from models.augment_cnn import AugmentCNN
from models.costs import cost, describe, describe_latency
from models.sync_bn import synchronise
from preproc import preprocessing
from run.loggers import Logger
from run.run import Run
from trained.evaluation import accuracy_by_class, confusion_of, evaluate, initial_tensors, predict
from utils import cosine_lr, get_data, param_size


def unchanged(X: Tensor, y: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """The default `augment_batch`: images and labels as they are."""
    return X, y


def main(
    network: type[AugmentCNN] = AugmentCNN,
    loggers: Iterable[type[Logger]] = (),
    augment_batch: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = unchanged,
):
    """Train or evaluate, as the command line says.

    network: the class to use; your script may pass a subclass; loggers: classes of loggers besides TensorBoard's;
    augment_batch: a function of a training batch (images, labels, number of classes) that returns other images and
    targets, such as mixup. A target is a label, or the probabilities of all classes.
    """
    with user_errors_in_one_line("augment.py"), ranks.group():
        augment(network, loggers, augment_batch)


def augment(network, loggers, augment_batch):
    config = ranks.on_rank_0(AugmentConfig)
    if config.evaluate:
        if ranks.size() > 1:
            raise UserError("--evaluate takes one process; leave torchrun out")
        return print_evaluation(config)
    genotype = ranks.on_rank_0(lambda: resolve(config.genotype))
    config.genotype = str(genotype)  # saved as text, since the file or folder that it names may change
    if config.gpus:
        ranks.launch(config.gpus)
    run = Run(config, loggers)

    size, channels, n_classes, trn_data, val_data = ranks.in_turn(lambda: load_data(config))
    check_sizes(config, size)
    limit_threads(config.batch_size, size, config.init_channels)
    options = {"batch_size": config.batch_size, "device": run.device, "workers": config.workers, "seed": config.seed}
    trn_loader = Loader(trn_data, range(len(trn_data)), **options)
    val_loader = Loader(val_data, range(len(val_data)), shuffle=False, **options)

    seed_generators(config.seed)
    net = build(network, config, run.device, size, channels, n_classes, genotype)
    taken = None
    if config.init_checkpoint and config.resume is None:
        classes = val_data.class_names(n_classes)
        tensors, taken = ranks.on_rank_0(lambda: initial_tensors(config.init_checkpoint, net, genotype, classes))
        net.load_state_dict(tensors, strict=False)
    costs = cost(net, channels, size)
    latency = ranks.on_rank_0(lambda: describe_latency(net, channels, size))
    if config.sync_bn:
        synchronise(net)
    optim = torch.optim.SGD(
        net.parameters(),
        config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )

    results = {
        "top1": 0.0,
        "best_top1": 0.0,
        "genotype": config.genotype,
        "input_size": size,
        "input_channels": channels,
        "preprocessing": preprocessing(config.dataset, size, channels, config.stem == "imagenet", config.resize),
        "classes": val_data.class_names(n_classes),
        "data": {"training": trn_data.fingerprint(), config.measured_on: val_data.fingerprint()},
    }
    results["mean"], results["std"] = val_data.normalisation()
    with run.interruptible():
        results = run.start({"net": net, "optim": optim}, results, network=network)
        scheduler = learning_rate(optim, config, done=run.epoch)
        if taken:
            run.log(taken)
        run.log(
            f"{len(trn_data)} training and {len(val_data)} {config.measured_on} images of {channels} x {size} x "
            f"{size}, {n_classes} classes; {param_size(net):.3f} M parameters without the auxiliary head; in training "
            f"{one_line(str(trn_data.transform))}"
        )
        run.log(f"images of each class: {trn_data.describe_classes()}")
        run.log(f"the network: {describe(costs)}; a forward pass takes {latency}")

        for epoch in range(run.epoch + 1, config.epochs + 1):
            net.drop_path_prob(config.drop_path_prob * (epoch - 1) / config.epochs)  # 0 in the first epoch
            train(epoch, run, net, trn_loader, optim, augment_batch, n_classes)
            top1 = validate(epoch, run, net, val_loader)
            scheduler.step()
            is_best = epoch == 1 or top1 > results["best_top1"]
            results |= {"top1": top1, "best_top1": max(top1, results["best_top1"])}
            run.end_epoch(is_best, results)

    for line in accuracy_by_class(confusion_of(net, val_loader, n_classes), results["classes"]):
        run.log(line)
    images = config.measured_on.replace("-", "_")
    run.finish(
        epochs=config.epochs,
        **{f"{images}_top1": results["top1"], f"{images}_error": 1 - results["top1"]},
        **{f"best_{images}_top1": results["best_top1"]},
        parameters_M=costs["parameters_M"],
        multiply_adds_M=costs["multiply_adds_M"],
    )


def load_data(config):
    """[size, channels, n_classes, training images, test images or those held out of training]."""
    return get_data(
        config.dataset,
        config.data_path,
        config.cutout_length,
        validation=True,
        seed=config.seed,
        augmentation=config.augmentation,
        crops=config.stem == "imagenet",
        hold_out=config.hold_out,
        **config.image_options(),
    )


def check_sizes(config, size):
    """Raise UserError if batches or images (`size` pixels a side) are too small for the network."""
    if config.aux_weight > 0 and config.batch_size < 2:
        raise UserError("--batch-size must be at least 2 with an auxiliary head, whose BN sees one pixel of each image")
    if config.stem == "imagenet" and (size < 64 or config.init_channels < 2):
        raise UserError(
            "--stem imagenet needs images of at least 64 pixels a side and --init-channels of at least 2, not "
            f"{size} and {config.init_channels}"
        )


def build(network, config, device, size, channels, n_classes, genotype):
    """Build the network for these options and this genotype, on the device."""
    net = network(
        size,
        channels,
        config.init_channels,
        n_classes,
        config.layers,
        config.aux_weight > 0,
        genotype,
        stem=config.stem,
        execution=config.execution,
    )
    return net.to(device, memory_format=torch.channels_last)


def learning_rate(optim, config, done):
    """The learning-rate scheduler after `done` epochs: exponential with --lr-decay, else a cosine to zero."""
    if config.lr_decay:
        return torch.optim.lr_scheduler.LambdaLR(optim, lambda epoch: config.lr_decay**epoch, last_epoch=done - 1)
    return cosine_lr(optim, config.epochs, done=done)


def print_evaluation(config):
    """Print the accuracy of a trained network, or with --predict the classes of the images in a folder, as CSV."""
    options = {name: getattr(config, name) for name in ("batch_size", "workers", "device", "mirror")}
    if config.predict:
        rows = predict(config.evaluate, config.predict, **options)
        csv.writer(sys.stdout, lineterminator="\n").writerows([("path", "class", "probability"), *rows])
        return
    evaluation = evaluate(config.evaluate, config.data_path, **options)
    print(evaluation.describe())
    for line in accuracy_by_class(evaluation.confusion(), evaluation.trained.results["classes"]):
        print(line)


def train(epoch, run, net, loader, optim, augment_batch=unchanged, n_classes=0):
    """One epoch of SGD. The objective is the loss plus aux_weight times the loss of the auxiliary head."""
    config = run.config
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    weights = list(net.parameters())
    meters = run.training_pass(epoch, len(loader), {"w": optim})

    net.train()
    for X, y, n in loader.epoch(epoch, meters.steps_done):
        net.set_drop_path_rows(n, ranks.rows(n))  # drop path draws its mask for the global batch, on every rank
        inputs, targets = augment_batch(X, y, n_classes)
        optim.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
            logits, aux_logits = net(inputs)
            loss = objective = criterion(logits, targets)
            if aux_logits is not None:
                objective = loss + config.aux_weight * criterion(aux_logits, targets)
        ranks.row_weighted(objective, y).backward()
        ranks.average_step(loss.detach(), net, weights, y, config.sync_bn)
        norm = nn.utils.clip_grad_norm_(weights, config.grad_clip or math.inf)
        optim.step()
        run.end_step(meters, loss.detach(), logits.detach(), y, n, w_gradient_norm=norm)


@torch.no_grad()
def validate(epoch, run, net, loader):
    """Loss and accuracy on the test images, or those held out of training; returns top 1 as a fraction."""
    criterion = nn.CrossEntropyLoss()
    meters = run.validation_pass(epoch, len(loader), run.config.measured_on)
    net.eval()
    for X, y, n in loader.epoch(epoch):
        logits, _ = net(X)
        run.end_step(meters, criterion(logits, y), logits, y, n)
    return meters.top1.avg


if __name__ == "__main__":
    main()
