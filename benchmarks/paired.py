"""Times several ways of doing a step side by side: each in a process of its own, one step each in turn."""

import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


def serve(step, cuda=False):
    """The worker's side: a step for each line on standard input, answered by seconds and peak memory in MB (10^6)."""
    for _ in sys.stdin:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            seconds, peak = start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() / 1e6
        else:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            peak = peak_memory() / 1e6
        print(json.dumps([seconds, peak]), flush=True)


def peak_memory():
    """This process's peak resident memory in bytes; getrusage's, on Linux, is at least its parent's at the start."""
    try:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(script, ways, n):
    """Run n steps of each way in turn, after one that is not counted. ways: name -> words that make `script` serve it.

    Returns name -> {"seconds": [...], "peak": MB of the whole process (on CUDA: of allocated memory)}.
    """
    results = {name: {"seconds": [], "peak": 0.0} for name in ways}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, words in ways.items():
            command = [sys.executable, script, "--serve", *map(str, words)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[name] = stack.enter_context(worker)
            stack.callback(worker.stdin.close)
        for i in range(n + 1):
            for name, worker in workers.items():
                worker.stdin.write("step\n")
                worker.stdin.flush()
                seconds, peak = json.loads(worker.stdout.readline())
                results[name]["peak"] = max(results[name]["peak"], peak)
                if i > 0:
                    results[name]["seconds"].append(seconds)
    return results


def report(title, results, reference, json_path=None):
    """Print a table; ratios are of the medians, and within each round (smallest to largest), to the reference.

    json_path: a file to which all times are added, as a line of JSON.
    """
    if json_path:
        with Path(json_path).open("a") as file:
            file.write(json.dumps({"title": title, "machine": machine(), "results": results}) + "\n")
    base = results[reference]
    print(f"\n{title}\n{'':32}  median s (range)           times faster (by round)    peak MB   of {reference}")
    for name, found in results.items():
        seconds = found["seconds"]
        rounds = [a / b for a, b in zip(base["seconds"], seconds)]
        middle = statistics.median(seconds)
        ratio = statistics.median(base["seconds"]) / middle
        print(
            f"{name:32}  {middle:6.3f} ({min(seconds):.3f} to {max(seconds):.3f})   "
            f"{ratio:5.2f} ({min(rounds):.2f} to {max(rounds):.2f})   {found['peak']:9.0f}   "
            f"{found['peak'] / base['peak']:.3f}",
            flush=True,
        )


def machine():
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}"
