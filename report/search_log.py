"""What a search writes about itself while it runs: to its log and to TensorBoard, with pictures of its cells."""

import statistics

import numpy as np
import torch
from PIL import Image

from config import AugmentConfig
from evidence import search_state
from genotypes import describe_truth
from models.augment_cnn import AugmentCNN
from models.costs import cost, describe, describe_latency
from models.spaces.space import cell_name
from report.cells import plot_cell


def alpha_tag(kind: str, node: int, source: int, op: str) -> str:
    """The tag of the weight of an operation on an edge. kind: the kind of cell."""
    return f"alpha_{kind}/node{node}_from{source}/{op}"


def chart_edges(run, net):
    """One chart for each edge, with a line for each operation, under TensorBoard's Custom Scalars."""
    charts = {}
    for kind, nodes in net.edge_weights().items():
        charts[f"alpha_{kind}"] = {}
        for node, weights in enumerate(nodes):
            for source in range(len(weights)):
                tags = [alpha_tag(kind, node, source, op) for op in net.primitives]
                charts[f"alpha_{kind}"][f"node {node} from {source}"] = ["Multiline", tags]
    run.charts(charts)


@torch.no_grad()
def show(epoch, run, net, history):
    """Write about an epoch that is over: edge weights, genotype and the state of the search."""
    genotype = net.genotype()
    for kind, weights in net.edge_weights().items():
        gene = getattr(genotype, kind)
        show_edges(run, kind, net.primitives, weights)
        for line in cell_in_words(kind, gene, net, weights):
            run.log(line)
        file = run.folder.plots / f"epoch{epoch:03d}-{kind}"
        path = plot_cell(genotype, kind, file, f"{cell_name(kind)}, epoch {epoch}")
        if path.suffix == ".png":
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            run.picture(f"cell/{kind}", pixels)
    run.log(f"genotype = {genotype}")
    show_state(run, genotype, history)


def show_edges(run, kind, primitives, weights):
    """The candidates' weights on every edge, in the log in percent, and in TensorBoard."""
    run.log(f"weights of alpha_{kind}, %:  " + "  ".join(primitives))
    for node, edges in enumerate(weights):
        for source, row in enumerate(edges.tolist()):
            columns = (f"{100 * weight:{len(op)}.2f}" for op, weight in zip(primitives, row))
            run.log(f"node {node} from {source}".rjust(25) + ":  " + "  ".join(columns))
            for op, weight in zip(primitives, row):
                run.scalar(alpha_tag(kind, node, source, op), weight)


def cell_in_words(kind, gene, net, weights):
    """A line for each node of a cell: the operations chosen, their sources and weights."""
    for i, (edges, node_weights) in enumerate(zip(gene, weights)):
        terms = []
        for op, source in edges:
            weight = node_weights[source, net.primitives.index(op)]
            terms.append(f"{op:>12} of {net.space.state_name(source)} ({100 * weight:.2f} %)")
        yield f"{kind:>6} node {i} =  " + "  + ".join(terms)


def show_state(run, genotype, history):
    """The state of the search in a sentence, in the log; its numbers in TensorBoard."""
    eigenvalue = history[-1]["eigenvalue"]
    run.scalar("state/stable_epochs", search_state.stable_epochs(history))
    if eigenvalue is not None:
        run.log(f"dominant eigenvalue of the Hessian of L_val in alpha: {eigenvalue:.4g}")
        run.scalar("state/eigenvalue", eigenvalue)
    for kind, margins in history[-1]["margins"].items():
        run.scalar(f"state/skip_connections_{kind}", search_state.skip_connections(getattr(genotype, kind)))
        run.scalar(f"state/margin_{kind}", statistics.median(margins))
    truth = history[-1]["truth"]
    if truth is not None:
        run.log(describe_truth(truth))
        for name in truth.keys() - {"of"}:
            run.scalar(f"published/{name}", truth[name])
    run.log(search_state.verdict(history))
    stop = search_state.early_stop(history)
    if stop is not None:
        done = "stopped" if run.config.early_stop else "--early-stop would have stopped"
        run.log(f"{done} at epoch {stop}, with the genotype of epoch {stop - search_state.WINDOW}")


def show_cost(run, genotype, size, channels, n_classes):
    """What the network costs that augment.py makes of a genotype, in the log."""
    options = AugmentConfig(["--genotype", str(genotype)])
    net = AugmentCNN(size, channels, options.init_channels, n_classes, options.layers, False, genotype)
    net = net.to(run.device, memory_format=torch.channels_last)
    run.log(f"the network that augment.py makes of it: {describe(cost(net, channels, size))}")
    run.log(f"a forward pass of it takes {describe_latency(net, channels, size)}")
