"""Checkpoints: written atomically, with a checksum; read without executing code; checked against the run."""

import copy
import hashlib
import io
import math
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from genotypes import from_str
from running.errors import UserError, shown
from running.folder import RunFolder, write_temporary
from running.forms import Optional, misfit, whole
from running.options import MAY_CHANGE

FORMAT = 2  # the version of the checkpoint format
SEAL = b"sha256 of the file without this comment: "
MAX_PLAIN = 10**8  # bytes of all that a checkpoint holds beside the numbers of tensors

# The position of a run within an epoch, here at its beginning. batches: training steps done; trained: whether that is
# all of them; meters: the averages over them; log: the length of the log, in bytes.
EPOCH_START = {"batches": 0, "trained": False, "meters": [], "log": 0}

NUMBER = frozenset({int, float})
PLAIN = frozenset({str, int, float, bool, type(None)})
FINGERPRINT = {"classes": {str: whole(0)}, "sha256": str}
OF_AN_EPOCH = {"epoch": whole(1), "valid_top1": NUMBER, "string": str, str: lambda value: True}
HISTORY = [
    OF_AN_EPOCH
    | {
        Optional("eigenvalue"): frozenset({*NUMBER, type(None)}),
        Optional("margins"): {"normal": [NUMBER], "reduce": [NUMBER]},
    }
]

# The results that a stage saves: what must be there; a script of the user's may save more. Runs of older versions lack
# `data`, the fingerprints of the images.
RESULTS = {
    "search": {
        "found": {Optional("last"): OF_AN_EPOCH, Optional("best"): OF_AN_EPOCH},
        "history": HISTORY,
        Optional("data"): {"training": FINGERPRINT},
        str: lambda value: True,
    },
    "augment": {
        "top1": NUMBER,
        "best_top1": NUMBER,
        "genotype": str,
        "input_size": whole(1),
        "input_channels": whole(1),
        Optional("preprocessing"): str,
        "classes": [str],
        "mean": [lambda value: type(value) is float and math.isfinite(value)],
        "std": [lambda value: type(value) is float and 0 < value < math.inf],
        Optional("data"): {"training": FINGERPRINT, Optional("test"): FINGERPRINT, Optional("held-out"): FINGERPRINT},
        str: lambda value: True,
    },
}


def _is_dict(value):
    return isinstance(value, dict)


def _bits(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1


# The form of a checkpoint, see running/forms.py. Older ones lack `classes`.
CONTENTS = {
    "format": int,
    "stage": str,  # search or augment
    "config": {str: PLAIN},  # the options
    Optional("classes"): {str: str},  # names of the classes of the network and, in a search, of the architect
    "epoch": whole(0),  # epochs that are done
    "step": whole(0),  # steps of the optimizer of w since the start
    "within": {  # the position in the epoch after those, see EPOCH_START
        "batches": whole(0),
        "trained": bool,
        "meters": [{"val": NUMBER, "avg": NUMBER, "sum": NUMBER, "count": whole(1)}],
        "log": whole(0),
    },
    "seconds": lambda value: type(value) is float and 0 <= value < math.inf,  # the running time so far
    "random": {"cpu": _bits, "cuda": [_bits], "numpy": [frozenset({str, float, int, list})], "python": tuple},
    "events": {str: whole(0)},  # the lengths of TensorBoard's files
    "keeps": {str: _is_dict},  # the states of the network and the optimizers, see `state_misfit`
    "results": _is_dict,  # other values of the script: genotypes, history, accuracies
}

# What these optimizers save of a parameter: name -> whether it is shaped as the parameter, and not a single number.
OPTIMIZER_STATE = {
    torch.optim.SGD: {"momentum_buffer": True},
    torch.optim.Adam: {"step": False, "exp_avg": True, "exp_avg_sq": True},
}


class DamagedCheckpointError(UserError):
    """A checkpoint file that is truncated or corrupted."""


def save_checkpoint(state, folder, is_best=False):
    """Save a state of tensors and built-in types as checkpoint.pt in the folder, and also as best.pt if `is_best`.

    The old checkpoint.pt becomes previous.pt. Each file is written atomically, see `write_temporary`, and ends with its
    checksum, which `load_checkpoint` checks and `torch.load` ignores. Raises OSError if a file cannot be written; the
    old files stay as they are.
    """
    files, data = RunFolder(folder), _sealed(state)
    if is_best:  # first: if the run is killed before checkpoint.pt is written, it repeats this step
        os.replace(write_temporary(files.best, data), files.best)
    temporary = write_temporary(files.checkpoint, data)
    if files.checkpoint.exists():
        _keep_as(files.checkpoint, files.previous)
    os.replace(temporary, files.checkpoint)
    _flush_names(files.path)


def load_checkpoint(path):
    """Read a file of `save_checkpoint`, with tensors on the CPU. Nothing in the file is executed.

    Needs no more memory than the file is large, since tensors are parts of the file, mapped to memory, until they are
    copied: so no file makes PyTorch unpack anything, or read beyond it. Raises DamagedCheckpointError if the checksum
    is missing or wrong, UserError if the file contains more than tensors and built-in types, FileNotFoundError if it
    does not exist.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DamagedCheckpointError(f"{path} is damaged: it is no regular file")
    with open(path, "rb") as file:
        start, sealed = file.read(4), _is_sealed(file)
    if sealed is False:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is another")
    try:
        if start == b"PK\x03\x04":
            _check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            state = copy.deepcopy(torch.load(path, map_location="cpu", weights_only=True, mmap=start[:1] != b"\x80"))
    except pickle.UnpicklingError:
        if start != b"PK\x03\x04" and start[:1] != b"\x80":  # neither an archive nor a pickle
            raise DamagedCheckpointError(f"{path} is damaged: it is no checkpoint") from None
        raise UserError(f"{path} is refused: it holds more than tensors and plain types") from None
    except MemoryError:
        raise
    except Exception:  # damaged files make the reader raise a dozen types, none of them documented
        raise DamagedCheckpointError(f"{path} cannot be read: it is damaged") from None
    if not sealed:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is missing")
    return state


def _is_sealed(file):
    """Whether the checksum at the end of a file is right; None if there is none. Reads a part of the file at a time."""
    length = len(SEAL) + 64 + 2
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - length, 0))
    end = file.read()
    if end[2:].startswith(SEAL):
        digest = hashlib.sha256()
        file.seek(0)
        for start in range(0, size - length, 2**20):
            digest.update(file.read(min(2**20, size - length - start)))
        digest.update(b"\0\0")
        return end == _comment(digest)
    return False if SEAL in end else None


def _check_archive(path):
    """Raise ValueError unless a zip archive is stored as it is, without compression, and its plain part is small."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED for file in files):
        raise ValueError("it is compressed")
    if sum(file.file_size for file in files) > path.stat().st_size:
        raise ValueError("its parts overlap")
    if sum(file.file_size for file in files if "/data/" not in file.filename) > MAX_PLAIN:
        raise ValueError("it is too large")


def find_checkpoint(folder, preferred=None):
    """Load the latest undamaged checkpoint of a `RunFolder`. Returns (checkpoint, its path, warning).

    preferred: a file to try first; warning: a text if a later file is damaged, else None. Returns (None, None, None) if
    there is no checkpoint, since the run was killed before it saved one. Raises UserError if all are damaged.
    """
    paths = [folder.checkpoint, folder.previous]
    if preferred is not None and Path(preferred).is_file():
        paths = [Path(preferred), *(path for path in paths if path != Path(preferred))]
    damage = None
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except FileNotFoundError:
            continue
        except DamagedCheckpointError as error:
            damage = damage or error
            continue
        return checkpoint, path, damage and f"{damage}; going on from {path.name}"
    if damage:
        raise UserError(f"{damage}, and there is no other to go on from; start anew with --overwrite")
    return None, None, None


def check_contents(checkpoint, path, stage):
    """Raise UserError unless a checkpoint has all that this program saves for a stage, of the right types and ranges.

    The network's and the optimizers' tensors are left to `state_misfit`.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    for name, value in {"format": FORMAT, "stage": stage}.items():
        if type(content.get(name)) is not type(value) or content[name] != value:
            found = shown(content[name]) if name in content else None
            raise UserError(f"{path} is of {name} {found}; this program reads {name} {value!r}")
    found = misfit(checkpoint, CONTENTS | {"results": RESULTS[stage]})
    found = found or _random_misfit(checkpoint["random"]) or _count_misfit(checkpoint)
    if found:
        raise UserError(f"{path} is not a checkpoint that this program wrote: {found}")


def _random_misfit(random_state):
    """What is wrong with the states of the random generators, which are tried on generators of their own; or None."""
    try:
        torch.Generator().set_state(random_state["cpu"])
        np.random.RandomState().set_state(tuple(random_state["numpy"]))
        random.Random().setstate(random_state["python"])
        is_inside = 0 <= random_state["numpy"][2] <= len(random_state["numpy"][1])  # NumPy does not check its position
        ends_well = misfit(random_state["python"][2], frozenset({float, type(None)})) is None
    except MemoryError:  # says nothing of the states
        raise
    except Exception:  # each generator has its own types of errors
        is_inside = ends_well = False
    return None if is_inside and ends_well else "random is no state of the generators"


def _count_misfit(checkpoint):
    """Which numbers of a checkpoint contradict each other, or None."""
    epoch, step, within, results = (checkpoint[name] for name in ("epoch", "step", "within", "results"))
    steps_before = step - within["batches"]  # in the epochs that are done
    # all of the same number of steps; of a run without fingerprints of its images they may have changed
    is_uneven = "data" in results and steps_before % max(epoch, 1) > 0
    if steps_before < epoch or is_uneven or (epoch == 0 and steps_before):
        return f"step is {step}, after {epoch} epochs and {within['batches']} batches"
    if len(within["meters"]) not in ((3,) if within["batches"] else (0, 3)):
        return f"within.meters has {len(within['meters'])} entries"
    if checkpoint["stage"] == "search":
        if [entry["epoch"] for entry in results["history"]] != list(range(1, epoch + 1)):
            return f"results.history is not of the {epoch} epochs that are done"
        if len(results["found"]) != (2 if epoch else 0):
            return f"results.found has {len(results['found'])} genotypes after {epoch} epochs"
    elif not len(results["mean"]) == len(results["std"]) == results["input_channels"] or not results["classes"]:
        return "results.mean and results.std are not of each channel, or there are no classes"
    return None


def check_fits(checkpoint, path, config):
    """Raise UserError, which says what differs, unless a run with these options can resume a checkpoint.

    Needs no network, so it comes before one is built.
    """
    check_contents(checkpoint, path, config.stage)
    saved, options = vars(config.restored(checkpoint["config"], path)), config.as_dict()
    fixed = options.keys() - set(MAY_CHANGE)
    if "data" not in checkpoint["results"]:  # an older version: no fingerprint to compare data with
        fixed |= {"data_path"}
    for name in sorted(fixed):
        if saved[name] != options[name]:
            raise UserError(f"{path} is of a run with {name} {shown(saved[name])}, not {shown(options[name])}")
    epochs_begun = checkpoint["epoch"] + (checkpoint["within"]["batches"] > 0)
    if epochs_begun > config.epochs:
        raise UserError(f"--epochs {config.epochs}: {path} has begun {epochs_begun} already")
    if config.stage == "search":
        entries = [*checkpoint["results"]["history"], *checkpoint["results"]["found"].values()]
        check_genotypes(entries, config, path)
    check_size(checkpoint, config, config.nodes * (config.nodes + 3) // 2 if config.stage == "search" else 1, path)


def check_size(checkpoint, config, n_edges, path):
    """Raise UserError if a checkpoint is too small for a network of these options, so that none is built to compare.

    n_edges: of a cell.
    """
    tensors = checkpoint["keeps"].get("net", {})
    n_numbers = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
    if config.layers > len(tensors) or max(config.init_channels, config.layers * n_edges) > n_numbers:
        raise UserError(
            f"{path} is too small for {config.layers} cells of {n_edges} edges and {config.init_channels} channels"
        )


def check_genotypes(entries, config, source):
    """Raise UserError unless the genotypes of a search's epochs are of its nodes and operations.

    entries: dicts of the form `OF_AN_EPOCH`; source: the file, for error messages.
    """
    allowed = set(config.primitives.split(","))
    for text in {entry["string"] for entry in entries}:
        try:
            genotype = from_str(text)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        for gene in (genotype.normal, genotype.reduce):
            if len(gene) != config.nodes or not {op for node in gene for op, _ in node} <= allowed:
                raise UserError(
                    f"{source} is not of this search: it has a cell of other nodes or operations, {shown(text)}"
                )


def check_classes(checkpoint, path, classes):
    """Raise UserError unless a checkpoint is of these classes: "network" (in a search also "architect") -> name."""
    for role, name in checkpoint.get("classes", {}).items():
        if name != classes.get(role):
            raise UserError(
                f"{path} is of a run with the {role} {name[:80]}, not {classes.get(role)}; resume it with the script "
                "that started it"
            )


def _tensor_misfit(tensor, like):
    """How a tensor differs from one that this program would have saved, in words, or None."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {'a tensor of another kind' if isinstance(tensor, torch.Tensor) else shown(tensor)}"
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        return f"is {tensor.dtype} of shape {shown(str(list(tensor.shape)))}, not {like.dtype} of {list(like.shape)}"
    return None


def state_misfit(saved, part):
    """How a saved state differs from what a network or an optimizer would have saved, in words, or None.

    Compared are the names, types, dtypes and shapes of all tensors; strides are not, since values are copied. Of an
    optimizer's parameters some may have no state, since they had no gradient yet.
    """
    if isinstance(part, torch.optim.Optimizer):
        return _optimizer_misfit(saved, part)
    expected = part.state_dict()
    missing, unknown = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or unknown:
        first = next(name for name in (*expected, *saved) if name in missing or name in unknown)
        return f"{len(missing)} tensors are missing and {len(unknown)} unknown, first {shown(first)}"
    for name, like in expected.items():
        found = _tensor_misfit(saved[name], like) if isinstance(like, torch.Tensor) else None
        if found:
            return f"{name} {found}"
    return None


def _optimizer_misfit(saved, optim):
    found = misfit(saved, {"state": _is_dict, "param_groups": [{str: lambda value: True}]})
    if found:
        return found
    parameters = [p for group in optim.param_groups for p in group["params"]]
    names = OPTIMIZER_STATE.get(type(optim))
    for index, state in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(state, dict):
            return f"state.{shown(index)} is of no parameter"
        if names is not None and state and state.keys() != names.keys():
            return f"state.{index} has other entries than {', '.join(names)}"
        for name, value in state.items():
            shaped = names[name] if names is not None else not (isinstance(value, torch.Tensor) and value.dim() == 0)
            found = _tensor_misfit(value, parameters[index] if shaped else torch.zeros(()))
            if not found and not shaped and not 1 <= value <= 2**53:
                found = f"is {value.item()}"
            if found and (value is not None or optim.param_groups[0].get("momentum") != 0):  # then SGD may save None
                return f"state.{index}.{name} {found}"
    return None


def load_state(part, saved):
    """Load a saved state that fits, see `state_misfit`, into a network or an optimizer.

    An optimizer takes its settings from the options, not from the file, and lays its buffers out as the parameters.
    """
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(saved)
        return
    parameters = [p for group in part.param_groups for p in group["params"]]
    state = {
        index: {name: _laid_out_as(parameters[index], value) for name, value in of_parameter.items()}
        for index, of_parameter in saved["state"].items()
    }
    if state and type(part) is torch.optim.SGD and part.param_groups[0]["momentum"] > 0:
        for index, parameter in enumerate(parameters):  # the fused step fails if some buffers are there and some not
            state.setdefault(index, {}).setdefault("momentum_buffer", torch.zeros_like(parameter, device="cpu"))
    groups = part.state_dict()["param_groups"]
    for group, before in zip(groups, saved["param_groups"]):
        if "initial_lr" in before:  # of the optimizers whose learning rate a scheduler changes, which needs it
            group["initial_lr"] = group["lr"]
    part.load_state_dict({"state": state, "param_groups": groups})


def _laid_out_as(parameter, value):
    if value is None or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, device="cpu").copy_(value)


def _sealed(state):
    """Serialise a state with torch.save, and append the checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _seal(buffer.getvalue())


def _seal(archive):
    """Append the checksum of a zip archive as its comment. Before, its last two bytes are the comment's length, 0."""
    return archive[:-2] + _comment(hashlib.sha256(archive))


def _comment(digest):
    """The end of a sealed archive: the comment's length, and the comment."""
    seal = SEAL + digest.hexdigest().encode()
    return len(seal).to_bytes(2, "little") + seal


def _keep_as(path, previous):
    """Make `previous` a hard link to the file. On file systems without hard links, rename the file to it."""
    temporary = previous.with_name(previous.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(temporary, previous)


def _flush_names(folder):
    """Flush a folder's entries to disk, so that renamed files survive a crash of the machine. No effect on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
