"""Distributed training: several processes (ranks) share a run, and each computes some rows of every batch.

torchrun starts the ranks and connects them. Without it there is one rank, and averages and barriers do nothing. Let
L_r be the mean loss over the n_r rows of rank r. The loss of the global batch is sum_r n_r L_r / sum_r n_r, and its
gradient is the same average of the ranks' gradients. Weights, alphas and optimizers are the same on every rank.
"""

import contextlib
import hashlib
import logging
import os
import signal
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from command_line.errors import INPUT_ERRORS, OtherRankError, UserError, shown

MIN_ROWS_PER_RANK = 2  # BN has no statistics of a single value
TIMEOUT = timedelta(hours=1)  # for communication: a rank may be downloading data, or reading all images of a folder
MEETING_TIMEOUT = timedelta(minutes=5)  # for the first meeting: the ranks start at the same time


@contextlib.contextmanager
def group():
    """Inside, this process is connected to the other ranks if torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    store, rank, size = _meet()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=_fresh_store(store, rank, size),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    try:
        yield
        dist.barrier()
    finally:
        if not cuda or sys.exc_info()[0] is None:  # after an error NCCL would wait for ranks that may have ended
            dist.destroy_process_group()


def _meet():
    """torchrun's key-value store, the number of this rank, and of all. Raises UserError if they are not to be had."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    numbers = {name: os.environ.get(name, "") for name in names}
    wrong = [name for name, text in numbers.items() if not (text.isascii() and text.isdecimal() and len(text) < 10)]
    is_local = not wrong and int(numbers["LOCAL_RANK"]) < int(numbers["LOCAL_WORLD_SIZE"])
    if wrong or not is_local or int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]) or "MASTER_ADDR" not in os.environ:
        values = ", ".join(f"{name}={shown(text)}" for name, text in numbers.items())
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set, as by torchrun, but {values} are not what it sets; unset it for one process"
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{numbers['MASTER_PORT']}"
        raise UserError(f"no connection to the first rank at {shown(address)}: {str(error)[:300]}") from None
    store.set_timeout(TIMEOUT)
    return store, rank, size


def _fresh_store(store, rank, size):
    """A part of torchrun's key-value store that is the same on all ranks and empty at every restart.

    torchrun keeps its store when it restarts the ranks, so it has addresses of processes that have ended. torchrun's
    count of restarts cannot distinguish the attempts, since each machine has its own count. So each rank stores a new
    random word, and waits until rank 0 has read it. Rank 0's word is the prefix of the keys.
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


def rank():
    """The number of this process, from 0. Only rank 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rows(n):
    """This rank's rows of a global batch of n, as a slice. The numbers of rows differ by at most one between ranks.

    If there are fewer than `MIN_ROWS_PER_RANK` rows for each rank, every rank gets the whole batch. That changes no
    mean.
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


def user_error(message):
    """An error to be raised on all ranks: only rank 0 prints it. The caller must raise it on every rank."""
    return UserError(message) if rank() == 0 else OtherRankError(message)


def on_rank_0(function):
    """Call the function on rank 0, and return its result on every rank. If it raises, every rank stops."""
    if size() == 1:
        return function()
    result = failure = None
    if rank() == 0:
        try:
            result = function()
        except (*INPUT_ERRORS, SystemExit) as error:
            failure = error
    code = failure.code if isinstance(failure, SystemExit) else 2
    message = [result, failure is not None, str(failure), code]
    dist.broadcast_object_list(message, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    result, failed, text, code = message
    if failed and code != 2:
        sys.exit(code)
    if failed:
        raise OtherRankError(text)
    return result


def in_turn(function):
    """Call the function on rank 0, then on one rank of each other machine, then on the others. Returns its result.

    So each machine downloads data only once. If the function raises on any rank, every rank stops.
    """
    if size() == 1:
        return function()
    result = failure = None
    turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for i in range(3):
        if i == turn:
            try:
                result = function()
            except INPUT_ERRORS as error:
                failure = error
        failed = torch.tensor(float(failure is not None))
        dist.all_reduce(failed)
        if failure is not None:
            raise failure
        if failed:
            raise OtherRankError("a rank before this one failed")
    return result


def check_equal(state, when):
    """Raise UserError unless all tensors in nested dictionaries, lists and tuples have the same bits on all ranks."""
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in _tensors_in(state):
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    digests = [None] * size()
    dist.all_gather_object(digests, digest.hexdigest())
    others = [i for i, other in enumerate(digests) if other != digests[0]]
    if others:
        raise user_error(
            f"{when} the state of rank {', '.join(map(str, others))} differs from rank 0's; the checkpoints are from "
            "before"
        )


def _tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    elif not isinstance(state, (list, tuple)):
        return []
    return [tensor for part in state for tensor in _tensors_in(part)]


def launch(gpus):
    """Run this command again with a rank for each of several GPUs, as torchrun does, and exit with its exit code.

    gpus: `all`, or numbers of CUDA devices, as 0,1,2. Raises UserError if there are no such devices.
    """
    if dist.is_torchelastic_launched():
        raise user_error("--gpus starts the ranks itself; with torchrun leave it out")
    chosen = visible_gpus(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    sys.exit(run_ranks(len(chosen), [*_this_program(), *_without_gpus(sys.argv[1:])]))


def _this_program():
    """The command-line words by which Python was started: a script's path, or -m and the name of a module."""
    spec = sys.modules["__main__"].__spec__
    return [sys.argv[0]] if spec is None else ["-m", spec.name]


def visible_gpus(gpus):
    """The entries of CUDA_VISIBLE_DEVICES for `all` GPUs, or for numbers as 0,1,2. Raises UserError."""
    n_gpus = torch.cuda.device_count()
    chosen = list(range(n_gpus)) if gpus == "all" else [int(number) for number in gpus.split(",")]
    if not chosen or max(chosen) >= n_gpus:
        raise UserError(
            f"--gpus {gpus}: this machine has the GPUs {', '.join(map(str, range(n_gpus))) or '(none)'}; on CPUs "
            "several ranks are started by torchrun --nproc-per-node N"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [names[i] if len(names) > i and names[i] else str(i) for i in chosen]


def _without_gpus(words):
    """A command line without --gpus and its value."""
    kept = []
    words = iter(words)
    for word in words:
        if word == "--gpus":
            next(words)
        elif not word.startswith("--gpus="):
            kept.append(word)
    return kept


def run_ranks(n, command):
    """Run a Python script on n ranks of this machine. Returns the exit code of the first rank that fails, or 0."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank that fails prints its error
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )

    def pass_on(number, frame):
        raise SignalException("", signal.Signals(number))

    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, pass_on)  # the launcher handles only SIGINT and SIGTERM
    try:
        elastic_launch(config, sys.executable)("-u", *map(str, command))
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
