"""Checkpoints: files written atomically, with a checksum, read without running code in them, that fit the run."""

import hashlib
import io
import os
import pickle
import warnings
from pathlib import Path

import torch

from config import MAY_CHANGE
from running.errors import UserError
from running.folder import RunFolder, write_temporary

FORMAT = 2  # of checkpoints
SEAL = b"sha256 of the file without this comment: "

# What a run's checkpoint holds, and of which type. `classes` came later, and may be missing.
CONTENTS = {
    "format": int,
    "stage": str,  # search or augment
    "config": dict,  # the options
    "epoch": int,  # epochs that are done
    "step": int,  # steps of the weights' optimizer since the start
    "within": dict,  # where the run is in its next epoch, see EPOCH_START
    "seconds": float,  # that the run has taken
    "random": dict,  # the state of all random generators
    "events": dict,  # the lengths of TensorBoard's files
    "keeps": dict,  # the states of the network and the optimizers
    "results": dict,  # what else the script needs: genotypes and history, accuracies
}

# Where a run is when an epoch begins. batches: steps done of its training; trained: whether those are all; meters: the
# averages over them; log: the length of the log, in bytes.
EPOCH_START = {"batches": 0, "trained": False, "meters": [], "log": 0}


class DamagedCheckpointError(UserError):
    """A checkpoint that is cut off or changed."""


def save_checkpoint(state, folder, is_best=False):
    """Save tensors and built-in types as checkpoint.pt in the folder, and as best.pt too if `is_best`.

    Each file is written atomically, see `write_temporary`. What checkpoint.pt held before is kept as previous.pt. Each
    ends with its checksum, which `load_checkpoint` checks and `torch.load` doesn't mind. Raises OSError if a file
    cannot be written; those that were there stay.
    """
    files, data = RunFolder(folder), _sealed(state)
    if is_best:  # first: a run that is killed between the two comes here again
        os.replace(write_temporary(files.best, data), files.best)
    temporary = write_temporary(files.checkpoint, data)
    if files.checkpoint.exists():
        _keep_as(files.checkpoint, files.previous)
    os.replace(temporary, files.checkpoint)
    _flush_names(files.path)


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, onto the CPU; nothing in the file is run.

    Raises DamagedCheckpointError where its checksum is missing or wrong, UserError where it holds more than tensors and
    built-in types, FileNotFoundError where it does not exist.
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
    """The last checkpoint of a `RunFolder` that is not damaged: (checkpoint, its path, warning).

    preferred: a file to try first. warning: that one is damaged, or None. All are None if there is no checkpoint: the
    run was killed before it saved anything. Raises UserError if there are only damaged ones.
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
    """Raise UserError, saying what differs, unless a run with these options and classes can go on from a checkpoint.

    classes: "network" (and "architect") -> the class's name.
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
    if "data" not in checkpoint["results"]:  # an older version: nothing tells whether other data are the same
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
    begun = checkpoint["epoch"] + (checkpoint["within"]["batches"] > 0)
    if begun > config.epochs:
        raise UserError(f"--epochs {config.epochs}: {path} has begun {begun} already")


def _sealed(state):
    """The bytes of torch.save, with their checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _seal(buffer.getvalue())


def _seal(archive):
    """A zip archive with its checksum as its comment, whose length, until then 0, is the archive's last two bytes."""
    seal = SEAL + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + len(seal).to_bytes(2, "little") + seal


def _keep_as(path, previous):
    """Give the file the name `previous` too; on file systems without hard links, instead of its own."""
    temporary = previous.with_name(previous.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(temporary, previous)


def _flush_names(folder):
    """Let a folder's renamed files survive a crash of the machine, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
