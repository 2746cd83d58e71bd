"""Times a training step done in several ways, in turn: seconds, peak memory, operations launched.

    python benchmarks/steps.py search                    # plain against fused, 32x32 and 8x8, second and first order
    python benchmarks/steps.py augment                   # the same of augment.py
    python benchmarks/steps.py search --beside OTHER     # this checkout against another one
    python benchmarks/steps.py search --device cuda --ways "plain" "plain graphs" "fused" "fused graphs"

A way is some words: `plain` or `fused`, then any of `recompute`, `nchw` (instead of channels-last), `amp`, `graphs`
(CUDA graphs) and the name of a variant. Each way runs in its own process. One
step of each is a round, and ratios are taken within a round, since a shared machine is slow for a while and then fast.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"search": ["plain nchw", "fused", "fused recompute"], "augment": ["plain nchw", "fused"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WAYS)
    parser.add_argument("--ways", nargs="+", metavar="WORDS", help="what is compared with the first of them")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="compare each way with another checkout's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 8], help="pixels a side (default: 32 8)")
    parser.add_argument("--orders", nargs="+", default=["second", "first"], help="search: (default: second first)")
    parser.add_argument("--batch-size", type=int, help="number of images (default: 64; augment: 96)")
    parser.add_argument("--init-channels", type=int, help="channels of the first cells (default: 16; augment: 36)")
    parser.add_argument("--layers", type=int, help="number of cells (default: 8; augment: 20)")
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each way (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cuda: memory is what PyTorch allocates (default: cpu)")
    parser.add_argument("--serve", metavar="CHECKOUT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = (96, 36, 20) if args.what == "augment" else (64, 16, 8)
    for name, default in zip(("batch_size", "init_channels", "layers"), defaults):
        setattr(args, name, getattr(args, name) or default)
    sys.path[:0] = [args.serve or str(ROOT), str(ROOT / "tests")]
    if args.serve:
        return serve(step_of(args), args)
    args.ways = args.ways or WAYS[args.what]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    machine += f", torch {torch.__version__}, {torch.get_num_threads()} threads"
    for size in args.sizes:
        for order in ["SGD"] if args.what == "augment" else args.orders:
            title = f"{args.what}, {order}, {size}x{size}, batch {args.batch_size}, C = {args.init_channels}"
            title += f", {args.layers} cells, n = {args.rounds}; {machine}"
            report(title, compare(args, size, order), args)


def step_of(args):
    """A function that takes one step in the first of `args.ways`, at the first size and of the first order."""
    torch.manual_seed(0)
    words = args.ways[0].split()
    return (augment_step if args.what == "augment" else search_step)(words, args)


def search_step(words, args):
    from architect import Architect
    from config import SearchConfig
    from models.search_cnn import SearchCNN
    from variants import VARIANTS, compose

    config = SearchConfig([word for name in words if name in VARIANTS for word in ("--variant", name)])
    network, architect_class = compose(config, SearchCNN, Architect)
    options = {"execution": words[0], "recompute": "recompute" in words}
    net = prepared(network(3, args.init_channels, 10, args.layers, nn.CrossEntropyLoss(), **options), words, args)
    net.begin_epoch(config.epochs, config.epochs)  # after the warm-up of pc-darts
    trn, val = batch(words, args), batch(words, args)
    weights, alphas = list(net.weights()), list(net.alphas())
    w_optim = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    alpha_optim = torch.optim.Adam(alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    architect = architect_class(net, 0.9, 3e-4)
    xi = 0.025 if args.orders[0] == "second" else 0.0
    mixed_precision = torch.autocast(args.device, torch.bfloat16, enabled="amp" in words)

    def alpha_gradient():
        with mixed_precision:
            architect.unrolled_backward(*trn, *val, xi, w_optim)

    def w_gradient():
        w_optim.zero_grad()
        with mixed_precision:
            loss = net.loss(*trn)
        loss.backward(inputs=weights)

    gradients = [alpha_gradient, w_gradient]

    def step():
        net.noise = net.draw_noise()
        gradients[0]()
        alpha_optim.step()
        gradients[1]()
        nn.utils.clip_grad_norm_(weights, 5.0)
        w_optim.step()

    if "graphs" in words:
        step()  # so that the momentum buffers exist
        gradients[:] = map(as_graph, gradients)
    return step


def augment_step(words, args):
    from genotypes import DARTS_V2
    from models.augment_cnn import AugmentCNN

    size = args.sizes[0]
    net = AugmentCNN(size, 3, args.init_channels, 10, args.layers, True, DARTS_V2, execution=words[0])
    net = prepared(net, words, args)
    net.drop_path_prob(0.1)
    X, y = batch(words, args)
    criterion = nn.CrossEntropyLoss()
    mixed_precision = torch.autocast(args.device, torch.bfloat16, enabled="amp" in words)
    optim = torch.optim.SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4, fused=True)

    def step():
        with mixed_precision:
            logits, aux_logits = net(X)
            loss = criterion(logits, y) + 0.4 * criterion(aux_logits, y)
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optim.step()

    return as_graph(step) if "graphs" in words else step


def prepared(net, words, args):
    """The network on its device, ready for training."""
    return net.to(args.device, memory_format=memory_format(words)).train()


def batch(words, args):
    X = torch.randn(args.batch_size, 3, args.sizes[0], args.sizes[0])
    return X.to(args.device, memory_format=memory_format(words)), torch.randint(10, X.shape[:1]).to(args.device)


def memory_format(words):
    return torch.contiguous_format if "nchw" in words else torch.channels_last


def as_graph(function):
    """The function as a CUDA graph, which launches all of its kernels by one call, after three runs without."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def serve(step, args):
    """Take a step for each line on standard input; answer with its seconds and the peak memory so far in MB (10^6)."""
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if args.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:  # peak resident memory of this process, on Linux
            peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        print(json.dumps([seconds, peak / 1e6]), flush=True)


def compare(args, size, order):
    """Rounds of one step of each way, after one that is not counted: {name: {"seconds": [...], "peak": MB}}."""
    options = ["--sizes", size, "--orders", order, "--device", args.device, "--batch-size", args.batch_size]
    options += ["--init-channels", args.init_channels, "--layers", args.layers]
    results, workers = {}, {}
    with contextlib.ExitStack() as stack:
        for way in args.ways:
            for checkout in [args.beside.resolve(), ROOT] if args.beside else [ROOT]:
                command = [sys.executable, __file__, args.what, "--serve", checkout, "--ways", way, *options]
                worker = subprocess.Popen(map(str, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                stack.enter_context(worker)
                stack.callback(worker.stdin.close)
                name = f"{way}, {checkout}" if args.beside else way
                workers[name], results[name] = worker, {"seconds": [], "peak": 0.0}
        for i in range(args.rounds + 1):
            for name, worker in workers.items():
                print("step", file=worker.stdin, flush=True)
                seconds, results[name]["peak"] = json.loads(worker.stdout.readline())
                results[name]["seconds"] += [seconds] * (i > 0)
    return results


def report(title, results, args):
    """Print a table. With --beside each way is compared with the other checkout's, else with the first way."""
    print(f"\n{title}\n{'':44}  median s (range)           times faster (interval)   peak MB, and its ratio")
    for i, (name, result) in enumerate(results.items()):
        reference = list(results.values())[i - i % 2 if args.beside else 0]
        seconds = result["seconds"]
        ratio, low, high = median_interval([a / b for a, b in zip(reference["seconds"], seconds)])
        print(
            f"{name:44}  {statistics.median(seconds):6.3f} ({min(seconds):.3f} to {max(seconds):.3f})   "
            f"{ratio:6.3f} ({low:.3f} to {high:.3f})   {result['peak']:9.0f}  {result['peak'] / reference['peak']:.3f}",
            flush=True,
        )


def median_interval(values):
    """The median with its interval of at least 95 % by order statistics; below six values, with the range."""
    n, ordered = len(values), sorted(values)
    k = 0  # so many values are left out at each end
    while sum(math.comb(n, i) for i in range(k + 2)) / 2**n <= 0.025:
        k += 1
    return statistics.median(values), ordered[k], ordered[n - 1 - k]


if __name__ == "__main__":
    main()
