"""Checkpoints: written atomically, with a checksum; read without executing code; checked against the run."""

import hashlib
import io
import os
import pickle
import warnings
from pathlib import Path

import torch

from running.errors import UserError
from running.folder import RunFolder, write_temporary
from running.options import MAY_CHANGE

FORMAT = 2  # the version of the checkpoint format
SEAL = b"sha256 of the file without this comment: "

# The entries of a checkpoint and their types. Older checkpoints lack one more entry, `classes`; see `check_fits`.
CONTENTS = {
    "format": int,
    "stage": str,  # search or augment
    "config": dict,  # the options
    "epoch": int,  # epochs that are done
    "step": int,  # steps of the optimizer of w since the start
    "within": dict,  # the position in the epoch after those, see EPOCH_START
    "seconds": float,  # the running time so far
    "random": dict,  # the states of all random generators
    "events": dict,  # the lengths of TensorBoard's files
    "keeps": dict,  # the states of the network and the optimizers
    "results": dict,  # other values of the script: genotypes, history, accuracies
}

# The position of a run within an epoch, here at its beginning. batches: training steps done; trained: whether that is
# all of them; meters: the averages over them; log: the length of the log, in bytes.
EPOCH_START = {"batches": 0, "trained": False, "meters": [], "log": 0}


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

    Raises DamagedCheckpointError if the checksum is missing or wrong, UserError if the file contains more than tensors
    and built-in types, FileNotFoundError if it does not exist.
    """
    data = Path(path).read_bytes()
    body, seal, _ = data.rpartition(SEAL)
    sealed = seal and data == _seal(body[:-2] + b"\0\0")
    if seal and not sealed:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is another")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not data.startswith((b"PK\x03\x04", b"\x80")):  # neither an archive nor a pickle
            raise DamagedCheckpointError(f"{path} is damaged: it is no checkpoint") from None
        raise UserError(f"{path} is refused: it holds more than tensors and plain types") from None
    except MemoryError:
        raise
    except Exception:  # damaged files make the reader raise a dozen types, none of them documented
        raise DamagedCheckpointError(f"{path} cannot be read: it is damaged") from None
    if not sealed and isinstance(state, dict) and state.get("format") == FORMAT:
        raise DamagedCheckpointError(f"{path} is damaged: its checksum is missing")
    return state


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


def check_fits(checkpoint, path, config, classes):
    """Raise UserError, which says what differs, unless a run with these options and classes can resume a checkpoint.

    classes: "network" (in a search also "architect") -> name of the class. Only the names are compared.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    for name, value in {"format": FORMAT, "stage": config.stage}.items():
        if content.get(name) != value:
            raise UserError(f"{path} is of {name} {content.get(name)!r}; this program resumes {name} {value!r}")
    for name, kind in (CONTENTS | {"classes": dict} if "classes" in content else CONTENTS).items():
        if type(content.get(name)) is not kind:
            raise UserError(
                f"{path} is not a checkpoint that this program wrote: {name} is missing or no {kind.__name__}"
            )
    if checkpoint["within"].keys() != EPOCH_START.keys():
        raise UserError(f"{path} is not a checkpoint that this program wrote: within has other keys")
    saved, options = config.completed(checkpoint["config"], path), config.as_dict()
    fixed = options.keys() - set(MAY_CHANGE)
    if "data" not in checkpoint["results"]:  # an older version: no fingerprint to compare data with
        fixed |= {"data_path"}
    for name in sorted(fixed):
        if saved[name] != options[name]:
            raise UserError(f"{path} is of a run with {name} {saved[name]!r}, not {options[name]!r}")
    for role, name in checkpoint.get("classes", {}).items():
        if name != classes.get(role):
            raise UserError(
                f"{path} is of a run with the {role} {name}, not {classes.get(role)}; resume it with the script that "
                "started it"
            )
    epochs_begun = checkpoint["epoch"] + (checkpoint["within"]["batches"] > 0)
    if epochs_begun > config.epochs:
        raise UserError(f"--epochs {config.epochs}: {path} has begun {epochs_begun} already")


def _sealed(state):
    """Serialise a state with torch.save, and append the checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _seal(buffer.getvalue())


def _seal(archive):
    """Append the checksum of a zip archive as its comment. Before, its last two bytes are the comment's length, 0."""
    seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


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
