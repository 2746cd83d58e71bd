"""One run on many processes, the ranks, each with a part of every batch: what torch.distributed leaves to the program.

torchrun starts the ranks and brings them together; without it there is one, and nothing here does anything. A rank
takes some rows of every global batch. With L_r the mean loss over the n_r rows of rank r, the global batch's loss is
sum_r n_r L_r / sum_r n_r, and so is every gradient of it. Weights, alphas and optimizers are the same on every rank.
"""

import contextlib
import hashlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from running.errors import OtherRankError, UserError

FEWEST = 2  # rows of a rank: BN has no statistics of a single value
PATIENCE = timedelta(hours=1)  # for a rank that is still downloading, or reading all images of a folder


@contextlib.contextmanager
def group():
    """Join the ranks that torchrun has started, if it has, for as long as the run takes."""
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=_unused_part(store, rank, size), rank=rank, world_size=size,
        timeout=PATIENCE,
    )  # fmt: skip
    try:
        yield
        dist.barrier()
    finally:
        if not cuda or sys.exc_info()[0] is None:  # NCCL would wait for ranks that may be gone
            dist.destroy_process_group()


def _unused_part(store, rank, size):
    """A part of torchrun's store in which nothing is left of an earlier attempt, the same for all ranks.

    torchrun keeps its store when it restarts the ranks, and a rank would find addresses of those that are gone; its
    count of restarts is each machine's own. So each rank leaves a word never used before, and goes on as soon as rank 0
    has read it; the part's name is rank 0's word.
    """
    words, own = [f"word of {i}" for i in range(size)], uuid.uuid4().hex
    store.set(words[rank], own)
    if rank == 0:
        answers = [f"{own} has been read by {i}" for i in range(1, size)]
        while answers and not store.check(answers):  # some of the words may be old
            store.set("words", " ".join(store.get(word).decode() for word in words))
            time.sleep(0.05)
        return dist.PrefixStore(own, store)
    while own not in (read := store.get("words").decode().split()):
        time.sleep(0.05)
    store.set(f"{read[0]} has been read by {rank}", "")
    return dist.PrefixStore(read[0], store)


def rank():
    """This process's number, from 0. Only rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rows(n):
    """The rows of a global batch of n that this rank takes, a slice: the ranks' follow each other, as even as can be.

    A batch too small to give each rank two rows goes to every rank as a whole, which leaves all means as they are.
    """
    if n < FEWEST * size():
        return slice(0, n)
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def data_parallel(net, device):
    """DistributedDataParallel of a network, which takes the mean of the ranks' gradients; itself on one rank.

    Buffers are left to `average_statistics`. For unequal parts of a batch see `ddp_weight`.
    """
    if size() == 1:
        return net
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the argument gets another name
        return DistributedDataParallel(net, [device] if device.type == "cuda" else None, broadcast_buffers=False)


def ddp_weight(n):
    """What turns this rank's mean loss over its rows of n into its part of the global one, by the mean over ranks."""
    if n < FEWEST * size():
        return 1.0
    own = rows(n)
    return (own.stop - own.start) * size() / n


def row_weighted(loss, y):
    """A mean loss over this rank's rows, of labels y, as it enters `average`: their sum. On one rank, the mean."""
    return loss * len(y) if size() > 1 else loss


def average(parts, y):
    """Of each tensor, computed from `row_weighted` of a loss at labels y, the one of the mean over all ranks' rows.

    All of one floating type and on one device; sent as one message. The results have the same bits on every rank.
    """
    if size() == 1:
        return parts
    flat = torch.cat([*(tensor.flatten() for tensor in parts), parts[0].new_tensor([len(y)])])
    dist.all_reduce(flat)
    found = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in parts])
    means = [torch.empty_like(tensor) for tensor in parts]  # as they lie in memory
    torch._foreach_copy_(means, [values.view(tensor.shape) for values, tensor in zip(found, parts)])
    return means


def average_statistics(net, y):
    """Give all ranks one set of BN's running statistics: the mean, weighted by their rows, of labels y.

    A statistic updated by the mean of some values is the mean of the statistic updated by each.
    """
    statistics = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    if size() > 1 and statistics:
        torch._foreach_copy_(statistics, average(torch._foreach_mul(statistics, len(y)), y))


def wait():
    """Wait until all ranks have come here."""
    if size() > 1:
        dist.barrier()


def user_error(message):
    """The UserError that all ranks meet alike, for rank 0 to tell."""
    return UserError(message) if rank() == 0 else OtherRankError(message)


def first(function):
    """Call on rank 0 while the others wait. All return what it returned, or end as it did, without a word."""
    if size() == 1:
        return function()
    found, failure = None, None
    if rank() == 0:
        try:
            found = function()
        except (UserError, OSError, SystemExit) as complaint:
            failure = complaint
    code = failure.code if isinstance(failure, SystemExit) else 2
    message = [found, failure is not None, str(failure), code]
    dist.broadcast_object_list(message, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    found, failed, text, code = message
    if failed and code != 2:
        sys.exit(code)
    if failed:
        raise OtherRankError(text)
    return found


def in_turn(function):
    """Call on rank 0, then on one rank of each other machine, then on the others: what a rank downloads, they find."""
    if size() == 1:
        return function()
    found = failure = None
    turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for i in range(3):
        if i == turn:
            try:
                found = function()
            except (UserError, OSError) as complaint:
                failure = complaint
        failed = torch.tensor(float(failure is not None))
        dist.all_reduce(failed)
        if failure is not None:
            raise failure
        if failed:
            raise OtherRankError("a rank before this one failed")
    return found


def check_equal(tensors, when):
    """Raise UserError unless these tensors have the same bits on all ranks, by a hash."""
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    digests = [None] * size()
    dist.all_gather_object(digests, digest.hexdigest())
    others = [i for i, found in enumerate(digests) if found != digests[0]]
    if others:
        raise user_error(
            f"{when} the state of rank {', '.join(map(str, others))} differs from rank 0's; the checkpoints are from "
            "before"
        )


def launcher():
    """Who started this process, in words that no other process's will be: on a restart by torchrun, the same.

    torchrun's own count of restarts leaves out those that another machine's ranks were the cause of.
    """
    started = Path(f"/proc/{os.getppid()}/stat")  # Linux has it, the 22nd field of the file
    when = started.read_text().rpartition(")")[2].split()[19] if started.is_file() else ""
    return f"{socket.gethostname()} {os.getppid()} {when}"


def launch(gpus, script):
    """Run this command on several GPUs of this machine, a rank each, as torchrun does, and exit with its code.

    gpus: `all`, or CUDA devices' numbers, as in 0,1,2. Raises UserError where they are not there.
    """
    if dist.is_torchelastic_launched():
        raise user_error("--gpus starts the ranks itself; with torchrun leave it out")
    there = range(torch.cuda.device_count())
    chosen = list(there) if gpus == "all" else [int(number) for number in gpus.split(",")]
    if not chosen or not set(chosen) <= set(there):
        raise UserError(
            f"--gpus {gpus}: this machine has the GPUs {', '.join(map(str, there)) or '(none)'}; on CPUs several ranks "
            "are started by torchrun --nproc-per-node N"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] if len(names) > i and names[i] else str(i) for i in chosen)
    sys.exit(run_ranks(len(chosen), [script, *_without_gpus(sys.argv[1:])]))


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
    """Run a Python script with its words on n ranks here; returns the code of the first that failed, or 0."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank says itself what is wrong
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=str(os.getpid()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip

    def pass_on(number, frame):
        raise SignalException("", signal.Signals(number))

    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, pass_on)  # as the launcher does with SIGINT and SIGTERM
    try:
        elastic_launch(config, sys.executable)("-u", *map(str, command))
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
