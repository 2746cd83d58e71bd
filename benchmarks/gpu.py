"""What a GPU does with the step of a search. benchmarks/on_a_gpu.sh runs all of it.

    python benchmarks/gpu.py tf32       # the error of eq. 7 in float32, with TF32 and without, against float64
    python benchmarks/gpu.py profile    # one step: launches, the share of time that the GPU works, the dearest kernels
    python benchmarks/gpu.py graphs     # a step's gradients with --cuda-graphs auto and off: seconds, and their bits
    python benchmarks/gpu.py layouts    # depthwise convolutions and products, as they are and in another layout

Prints text, and adds a line of JSON to the file that --json names. With --device cpu it runs without a GPU, to show
that the program works: its times then say nothing, and `graphs` does nothing.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import architect
from architect import Architect
from benchmarks.paired import machine
from config import SearchConfig
from machine.cuda_graphs import EAGER_STEPS, StepGraphs
from machine.devices import use_deterministic_algorithms
from models.fast import search_cell
from models.search_cnn import SearchCNN
from search import w_gradient


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: %(default)s)")
    parser.add_argument("--init-channels", type=int, default=16, help="channels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="counted runs of each (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="add the results to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        search_cell.layout_for = lambda x: search_cell.BATCHED  # as on CUDA
    print(f"{args.what}: {machine()}; {vars(args)}", flush=True)
    results = COMMANDS[args.what](args)
    if args.json:
        with Path(args.json).open("a") as file:
            file.write(json.dumps({"what": args.what, "machine": machine(), "options": vars(args)} | results) + "\n")


def network(args, dtype=torch.float32):
    """The network, its architect and w's optimizer, and two batches."""
    torch.manual_seed(0)
    net = SearchCNN(3, args.init_channels, 10, args.layers, nn.CrossEntropyLoss())
    batches = [
        (torch.randn(args.batch_size, 3, args.size, args.size), torch.randint(10, (args.batch_size,))) for _ in "TV"
    ]
    net = net.to(args.device, dtype, memory_format=torch.channels_last).train()
    trn, val = ((X.to(args.device, dtype, memory_format=torch.channels_last), y.to(args.device)) for X, y in batches)
    w_optim = torch.optim.SGD(net.weights(), 0.025, momentum=0.9, weight_decay=3e-4, fused=True)
    return net, Architect(net, 0.9, 3e-4), w_optim, trn, val


def synchronise(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def seconds(function, args):
    """The median time of a call, each with all that it starts on the device."""
    times = []
    for _ in range(args.rounds + 1):
        synchronise(args)
        start = time.perf_counter()
        function()
        synchronise(args)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def tf32(args):
    """Relative errors of H, eq. 7."""
    hessians, d = {}, None
    for name in ("float64", "float32", "float32 with TF32"):
        net, bilevel, _, trn, _ = network(args, torch.float64 if name == "float64" else torch.float32)
        d = d or torch.autograd.grad(net.loss(*trn), list(net.weights()))  # in float64
        d_rounded = [g.to(w) for g, w in zip(d, net.weights())]
        with allowing_tf32() if "TF32" in name else contextlib.nullcontext():
            hessian = bilevel.compute_hessian(d_rounded, *trn)
        hessians[name] = torch.cat([h.flatten().double() for h in hessian])
    exact = hessians.pop("float64")
    errors = {name: ((hessian - exact).norm() / exact.norm()).item() for name, hessian in hessians.items()}
    for name, error in errors.items():
        print(f"error of eq. 7 in {name}: {error:.2%}")
    return {"errors": errors}


@contextlib.contextmanager
def allowing_tf32():
    """Inside, the architect does not switch TF32 off, and matrix products use it too."""
    switch, architect.full_float32 = architect.full_float32, contextlib.nullcontext
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        architect.full_float32 = switch
        torch.set_float32_matmul_precision("highest")


def profile(args):
    """One step, as search.py takes it."""
    net, bilevel, w_optim, trn, val = network(args)
    weights = list(net.weights())
    alpha_optim = torch.optim.Adam(net.alphas(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def step():
        bilevel.unrolled_backward(*trn, *val, 0.025, w_optim)
        alpha_optim.step()
        w_optim.zero_grad()
        net.loss(*trn).backward(inputs=weights)
        nn.utils.clip_grad_norm_(weights, 5.0)
        w_optim.step()

    step_seconds = seconds(step, args)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronise(args)
    events = profiler.key_averages()
    launches = sum(event.count for event in events if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    print(f"a step takes {step_seconds:.4f} s; {launches} launches; the GPU works for {busy:.4f} s of it")
    print(f"busy: {busy / step_seconds:.0%}")
    dearest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:15]
    rows = [(event.key, event.count, event.self_device_time_total / 1e6) for event in dearest]
    for name, count, total in rows:
        print(f"{total:9.5f} s  {count:6}  {name[:120]}")
    return {"step": step_seconds, "launches": launches, "busy_seconds": busy, "dearest": rows}


def graphs(args):
    """The gradients of alpha and w as search.py computes them, with --cuda-graphs off and auto, and --deterministic."""
    if args.device == "cpu":
        print("graphs: needs CUDA")
        return {}
    use_deterministic_algorithms()
    results = {choice: timed_gradients(choice, args) for choice in ("off", "auto")}
    gradients = [result.pop("gradients") for result in results.values()]
    same = all(map(torch.equal, *gradients))
    for choice, result in results.items():
        print(f"--cuda-graphs {choice}: {result['seconds']:.4f} s, peak of allocated memory {result['peak_MB']:.0f} MB")
    print(f"{results['off']['seconds'] / results['auto']['seconds']:.2f} times faster; same bits: {same}")
    return results | {"same_bits": same}


def timed_gradients(choice, args):
    """Seconds and peak memory of the gradients of a step, and the gradients."""
    net, bilevel, w_optim, trn, val = network(args)
    weights, alphas = list(net.weights()), list(net.alphas())
    config = SearchConfig(["--cuda-graphs", choice])
    step_graphs = StepGraphs(argparse.Namespace(config=config, device=torch.device("cuda"), log=print), net, bilevel)
    context = contextlib.nullcontext()

    def step():
        step_graphs.run(bilevel.unrolled_backward, inputs=(*trn, *val), fixed=(0.025, w_optim), fills=alphas)
        w_optim.zero_grad()
        step_graphs.run(w_gradient, inputs=trn, fixed=(net, weights, context), fills=weights)

    torch.cuda.reset_peak_memory_stats()
    for _ in range(EAGER_STEPS + 1):
        step()
    return {
        "seconds": seconds(step, args),
        "peak_MB": torch.cuda.max_memory_allocated() / 1e6,
        "gradients": [parameter.grad.clone() for parameter in (*alphas, *weights)],
    }


def layouts(args):
    """Depthwise convolutions of E edges, and the products that long sums make, in two layouts each."""
    N, results = args.batch_size, {}
    for E, C, size in ((8, args.init_channels, args.size), (8, 4 * args.init_channels, args.size // 4)):
        for k, dilation in ((3, 1), (5, 1), (3, 2), (5, 2)):
            padding = dilation * (k // 2)
            for name, shape, groups in (("1, E*C*N", (1, E * C * N), E * C * N), ("N, E*C", (N, E * C), E * C)):
                x = torch.randn(*shape, size, size, device=args.device)
                weight = torch.randn(groups, 1, k, k, device=args.device)
                results[f"depthwise {k}x{k}, dilation {dilation}, E {E}, C {C}, {size}x{size}: ({name})"] = passes(
                    lambda x, weight, p=padding, d=dilation, g=groups: F.conv2d(x, weight, None, 1, p, d, g),
                    x,
                    weight,
                    args,
                )
        pixels = size * size
        M = torch.randn(4 * E, C, C, device=args.device)
        joined = torch.randn(4 * E, C, N * pixels, device=args.device)
        apart = torch.randn(N, 4 * E, C, pixels, device=args.device)
        title = f"products of {4 * E} edges, C {C}, {size}x{size}"
        results[f"{title}: (E, C, N*H*W)"] = passes(torch.matmul, joined, M, args, swap=True)
        results[f"{title}: (N, E, C, H*W)"] = passes(torch.matmul, apart, M, args, swap=True)
    for name, times in results.items():
        print(f"{name:64}" + "  ".join(f"{part} {1e3 * value:8.3f} ms" for part, value in times.items()), flush=True)
    return {"layouts": results}


def passes(function, x, weight, args, swap=False):
    """Seconds of the forward pass, and with the gradients of x and of the weight."""
    x.requires_grad_()
    weight.requires_grad_()
    inputs = (weight, x) if swap else (x, weight)
    y = function(*inputs)
    g = torch.randn_like(y)
    return {
        "forward": seconds(lambda: function(*inputs), args),
        "gradient of x": seconds(lambda: torch.autograd.grad(y, x, g, retain_graph=True), args),
        "of the weight": seconds(lambda: torch.autograd.grad(y, weight, g, retain_graph=True), args),
    }


COMMANDS = {"tf32": tf32, "profile": profile, "graphs": graphs, "layouts": layouts}

if __name__ == "__main__":
    main()
