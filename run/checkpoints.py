"""Files of checkpoints: written atomically, with a checksum; read without executing code.

run/checkpoint_checks.py says whether what was read is what this program would have written.
"""

import copy
import hashlib
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from command_line.errors import UserError
from run.folder import RunFolder, write_temporary

FORMAT = 2  # the version of the checkpoint format
SEAL = b"sha256 of the file without this comment: "
MAX_PLAIN = 10**8  # bytes of all that a checkpoint holds beside the numbers of tensors

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
