"""Files of checkpoints: written whole or not at all, with a checksum, and read without running anything in them."""

import hashlib
import io
import os
import pickle
import warnings
from pathlib import Path

import torch

from running.errors import UserError

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "previous.pt", "best.pt"
FORMAT = 2  # of checkpoints
SEAL = b"sha256 of the file without this comment: "


class DamagedCheckpointError(UserError):
    """A checkpoint that is cut off or changed."""


def save_checkpoint(state, folder, is_best=False):
    """Save tensors and built-in types as checkpoint.pt in the folder, and as best.pt too if `is_best`.

    A file is complete or as it was: each is written beside its place, flushed to disk, and renamed. What checkpoint.pt
    held before is kept as previous.pt. Each ends with its checksum, which `load_checkpoint` checks and `torch.load`
    doesn't mind. Raises OSError if a file cannot be written; those that were there stay.
    """
    folder, data = Path(folder), _sealed(state)
    for name in [BEST] * is_best + [CHECKPOINT]:  # a run killed between the two comes here again
        path = folder / name
        beside = path.with_suffix(".tmp")
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        if name == CHECKPOINT and path.exists():
            _keep_as(path, folder / PREVIOUS)
        os.replace(beside, path)
    _flush_names(folder)


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, onto the CPU; nothing in the file is run.

    Raises DamagedCheckpointError where its checksum is missing or another, UserError where it holds more than tensors
    and built-in types, FileNotFoundError where there is none.
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
    """Let `previous` name the file too, whatever it named before; where files have one name only, instead."""
    beside = previous.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(beside, previous)


def _flush_names(folder):
    """Let a folder's renamed files survive a crash of the machine, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
