"""Distributed training: several processes (ranks) share a run, and each computes some rows of every batch.

torchrun starts the ranks and connects them. Without it there is one rank, and averages and barriers do nothing. Let
L_r be the mean loss over the n_r rows of rank r. The loss of the global batch is sum_r n_r L_r / sum_r n_r, and its
gradient is the same average of the ranks' gradients. Weights, alphas and optimizers are the same on every rank.
"""

import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from command_line.errors import INPUT_ERRORS, ThisRankError, UserError

MIN_ROWS_PER_RANK = 2  # BN has no statistics of a single value
TIMEOUT = timedelta(hours=1)  # for communication: a rank may be downloading data, or reading all images of a folder


@contextlib.contextmanager
def group():
    """Inside, this process is connected to the other ranks if torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store = unused_store(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
        dist.barrier()
    finally:
        if not cuda or sys.exc_info()[0] is None:  # after an error NCCL would wait for ranks that may have ended
            dist.destroy_process_group()


def unused_store(store, rank, size):
    """A part of torchrun's key-value store that is the same on all ranks, and that no earlier attempt has used.

    torchrun keeps its store when it restarts the ranks, with the addresses of processes that have ended. Its count of
    restarts does not tell the attempts apart, since each machine has its own count. So each rank stores a new random
    word and waits until rank 0 has read it. The word of rank 0 is the prefix of the keys.
    """
    keys, word = [f"word of {i}" for i in range(size)], uuid.uuid4().hex
    store.set(keys[rank], word)
    if rank == 0:
        answers = [f"{word} has been read by {i}" for i in range(1, size)]
        while answers and not store.check(answers):  # before that, some words may be of an earlier attempt
            store.set("words", " ".join(store.get(key).decode() for key in keys))
            time.sleep(0.05)
        return dist.PrefixStore(word, store)
    while word not in (words := store.get("words").decode().split()):
        time.sleep(0.05)
    store.set(f"{words[0]} has been read by {rank}", "")
    return dist.PrefixStore(words[0], store)


def rank() -> int:
    """The number of this process, from 0. Only rank 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rows(n: int) -> slice:
    """This rank's rows of a global batch of n, as a slice. The numbers of rows differ by at most one between ranks.

    If there are fewer than `MIN_ROWS_PER_RANK` rows for each rank, every rank gets the whole batch. The averages stay
    the same.
    """
    if n < MIN_ROWS_PER_RANK * size():
        return slice(0, n)
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def row_weighted(loss, y):
    """The mean loss times the number of this rank's rows, as `average` needs it; with one rank the mean loss itself.

    y: the labels of this rank's rows.
    """
    return loss * len(y) if size() > 1 else loss


def average(tensors, y):
    """Average over the ranks, weighted by their numbers of rows: sum_r t_r / sum_r n_r, a list of tensors.

    tensors: this rank's values t_r: row-weighted ones (see `row_weighted`) or gradients of row-weighted losses, all of
    one dtype and on one device; y: the labels of its n_r rows. There is one all-reduce, and all ranks get the same
    bits. With one rank it returns `tensors`.
    """
    if size() == 1:
        return tensors
    flat = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_full((1,), len(y))])
    dist.all_reduce(flat)
    averages = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in tensors])
    results = [torch.empty_like(tensor) for tensor in tensors]  # of the same memory format
    torch._foreach_copy_(results, [values.view(tensor.shape) for values, tensor in zip(averages, tensors)])
    return results


def average_step(loss, net, parameters, y, sync_bn):
    """After backward of a row-weighted loss: average gradients, running statistics and the loss over the ranks.

    loss: the mean loss over this rank's rows; y: their labels; parameters: their gradients are averaged in place. A
    parameter without a gradient is skipped: it has none on any rank, as in a node that the cell does not concatenate.
    The running statistics of BN are averaged too, unless `sync_bn` has made them equal. (They are linear in the batch
    statistics, so their average is what the averaged batch statistics give.) Returns the loss over the global batch.
    """
    if size() == 1:
        return loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    statistics = [] if sync_bn else [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    loss, *averages = average([loss * len(y), *gradients, *(buffer * len(y) for buffer in statistics)], y)
    torch._foreach_copy_(gradients + statistics, averages)
    return loss


def wait():
    """A barrier: wait until all ranks call this."""
    if size() > 1:
        dist.barrier()


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Run a function on rank 0 and return its result on every rank. If it raises, every rank stops; rank 0 prints."""
    if size() == 1:
        return function()
    result = failure = None
    if rank() == 0:
        try:
            result = function()
        except (*INPUT_ERRORS, SystemExit) as error:
            failure = error
    message = [result, failure and (str(failure), getattr(failure, "code", 2))]
    dist.broadcast_object_list(message, device=torch.device("cpu"))
    result, failed = message
    if failure is not None:
        raise failure
    if failed is None:
        return result
    text, code = failed
    if code != 2:
        sys.exit(code)
    raise UserError(text)


def in_turn(function: Callable[[], Any]) -> Any:
    """Run a function on the first rank of each machine, which may download data, then on the others.

    Returns its result. An error is printed once on each machine.
    """
    if local_rank() > 0:
        wait()
    try:
        result = function()
    except INPUT_ERRORS as error:
        raise (ThisRankError if local_rank() == 0 else UserError)(str(error)) from None
    if local_rank() == 0:
        wait()
    return result


def launch(gpus: str):
    """Run this command again by torchrun, with a rank for each of several GPUs. Returns only if torchrun runs it.

    gpus: `all`, or numbers of CUDA devices, such as 0,1,2. Raises UserError if there are no such devices.
    """
    if dist.is_torchelastic_launched():
        return
    chosen = visible_gpus(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(chosen))))
    script = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if script is None else ["-m", script.name]
    words = [*torchrun_words(len(chosen)), *program, *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words])


def torchrun_words(n: int) -> list[str]:
    """Options of torchrun for n ranks on this machine, which get each signal that stops a run."""
    handled = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup lets it be ignored
        handled.append("SIGHUP")
    return ["--standalone", f"--nproc-per-node={n}", f"--signals-to-handle={','.join(handled)}"]


def visible_gpus(gpus: str) -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES for `all` GPUs, or for numbers such as 0,1,2. Raises UserError."""
    n_gpus = torch.cuda.device_count()
    chosen = list(range(n_gpus)) if gpus == "all" else [int(number) for number in gpus.split(",")]
    if not chosen or max(chosen) >= n_gpus:
        raise UserError(
            f"--gpus {gpus}: this machine has the GPUs {', '.join(map(str, range(n_gpus))) or '(none)'}; on CPUs "
            "several ranks are started by torchrun --nproc-per-node N"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [names[i] if len(names) > i and names[i] else str(i) for i in chosen]
