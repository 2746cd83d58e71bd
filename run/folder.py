"""The folder of a run: the names of its files, and the operations on the folder as a whole.

A folder may come from a stranger, so `RunFolder.check` comes before anything in it is read or written. This module does
not import torch, so that command lines are read without it.
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
from pathlib import Path

from command_line.errors import UserError, shown, warn
from models.genotype import GenotypeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_JSON = 10**8  # bytes of a JSON file that is read


class RunFolder:
    """The folder of a run, with the path of each of its files as an attribute. Creates and reads nothing.

    path: `RUNS_PATH/search/NAME` or `RUNS_PATH/augment/NAME`.
    """

    identity = None  # of the folder on disk, since `lock`
    locked = None  # the open file on which `lock` holds the lock
    is_new = False  # whether `create` has been called

    def __init__(self, path):
        self.path = Path(path)

        self.config = self.path / "config.json"  # the options
        self.launcher = self.path / "launcher.txt"  # identifies the process that started the run, see `launcher`
        self.lock_file = self.path / "lock"  # the process that writes to the folder, which holds a lock on this file

        self.checkpoint = self.path / "checkpoint.pt"  # the last
        self.previous = self.path / "previous.pt"  # the one before
        self.best = self.path / "best.pt"  # the checkpoint of the epoch with the best accuracy

        self.log = self.path / "log.txt"
        self.tensorboard = self.path / "tb"  # a folder of event files
        self.plots = self.path / "plots"  # a folder of pictures of cells
        self.genotype = self.path / "genotype.json"  # search only: the genotype that it gives, and the best epoch's
        self.history = self.path / "history.json"  # search only: genotype and validation accuracy of each epoch
        self.summary = self.path / "summary.json"  # the results, written at the end of the run
        self.fault = self.path / "fault.json"  # the batches of the step whose loss or gradient was not finite
        self.report = self.path / "report.html"

    def __str__(self):
        return str(self.path)

    @property
    def replaced(self):
        """Where the run is that --overwrite replaces, until the new one is saved."""
        absolute = Path(os.path.abspath(self.path))
        return absolute.parent / f".{absolute.name}.replaced"

    def check(self):
        """Raise UserError if the folder holds anything but folders and files, such as links, through which a run would
        write elsewhere, or pipes, which would stop it. No effect if there is no folder.
        """
        folders = [self.path] if self.path.is_dir() else []
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        check_file(entry.path)

    def check_free(self, overwrite):
        """Raise UserError unless a new run may use this folder: it is free, or holds a run that may be overwritten."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self} is a file; choose another --name")
        if self._is_unused():
            return self.check()
        if not self.config.is_file():
            raise UserError(f"{self} holds files that are no run's; choose another --name")
        if not overwrite:
            resume = f"go on with --resume {self}, " if self.checkpoint.is_file() else ""
            raise UserError(
                f"{self} already holds a run; {resume}replace it with --overwrite, or choose another --name"
            )
        if self.path.is_symlink():
            raise UserError(f"{self} is a link to a folder, which --overwrite does not replace; delete it yourself")

    def _is_unused(self):
        """Whether the folder holds nothing, or what is left by a run that was killed before it wrote config.json."""
        return all(path.suffix == ".tmp" or path in (self.launcher, self.lock_file) for path in self.path.iterdir())

    def lock(self):
        """Let this process alone write to the folder, until `unlock`. Raises UserError if another does.

        The lock is the system's, on a file that names the process. It ends with the process, however that ends, and
        processes that load images do not inherit it.
        """
        self.unlock()
        self.identity = _identity(self.path)
        if fcntl is None:
            return
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self.locked = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return warn(f"{self} cannot be locked on this file system ({error}); let no other command write to it")
            holder = " ".join(os.read(descriptor, 200).decode(errors="replace").split())
            raise UserError(f"{self} is in use by {shown(holder)}; end that, or choose another --name") from None
        with contextlib.suppress(OSError):  # a full disk: the text is for other people only
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def unlock(self):
        """Let other processes write to the folder. No effect if there is no lock."""
        if self.locked is not None:
            self.locked.close()
            self.locked = None

    def check_unmoved(self):
        """Raise UserError if this is no longer the folder that was locked: it has been renamed, deleted or replaced."""
        if _identity(self.path) != self.identity:
            raise UserError(
                f"{self} was renamed, deleted or replaced while the run was writing to it; the run has ended"
            )

    def create(self, options, overwrite):
        """Create the folder of a new run, and write config.json. With `overwrite`, set the old run aside.

        To be followed by `forget_replaced` once the run is saved, or by `discard`.
        """
        if overwrite:
            self._set_aside()
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.check_free(overwrite=False)  # again: another command may have begun a run since
        self.is_new = True
        self.update(options)

    def update(self, options):
        """Write config.json and which process has started the run, and create the folder of pictures."""
        os.replace(write_temporary(self.launcher, launcher().encode()), self.launcher)
        write_json(self.config, options)
        self.plots.mkdir(exist_ok=True)

    def _set_aside(self):
        """Move the run to `replaced`, so that it is there until the new one is saved."""
        if os.path.isdir(self.replaced) and not self.checkpoint.exists():  # what is in the folder was never saved
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            os.rename(self.path, self.replaced)

    def recover(self):
        """Put the run back that --overwrite had set aside when it was killed, unless the new run has begun."""
        if not os.path.isdir(self.replaced) or (self.path.exists() and not self._is_unused()):
            return
        if self.path.exists():
            self.lock()
            shutil.rmtree(self.path, ignore_errors=True)
        self.discard()

    def discard(self):
        """Delete what `create` has created, and put the old run back."""
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        if os.path.isdir(self.replaced) and not self.path.exists():
            os.rename(self.replaced, self.path)

    def forget_replaced(self):
        """Delete the run that was set aside, if any."""
        shutil.rmtree(self.replaced, ignore_errors=True)

    def check_room(self):
        """Raise OSError unless the disk has room for three checkpoints and for a fourth while it is written.

        To be called after the first checkpoint is saved. Later ones are assumed to be twice as large, since they
        contain the optimizers' buffers. What a replaced run takes counts as free.
        """
        needed = 4 * 2 * self.checkpoint.stat().st_size
        replaced = sum(path.lstat().st_size for path in self.replaced.rglob("*"))
        free = shutil.disk_usage(self.path).free + replaced
        if free < needed:
            raise OSError(f"its checkpoints need {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    def log_size(self):
        """The length of log.txt in bytes."""
        return self.log.stat().st_size if self.log.exists() else 0

    def event_sizes(self):
        """The lengths of TensorBoard's event files: name -> bytes."""
        return {path.name: path.stat().st_size for path in self.tensorboard.glob("events.*")}

    def cut_off(self, log_size, event_sizes):
        """Truncate log.txt and the event files to the lengths at a checkpoint, since the steps after it run again."""
        sizes = {self.log: log_size}
        sizes |= {path: event_sizes.get(path.name, 0) for path in self.tensorboard.glob("events.*")}
        for path, size in sizes.items():
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)


def check_file(path):
    """Raise UserError if a path to be written in a stranger's folder is a link or no regular file.

    A file may have a second name elsewhere (a hard link) only if a run replaces it and never writes into it.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # a running run has deleted it since
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise UserError(f"{path} is {kind}; a run's folder may hold files and folders only")
    if status.st_nlink > 1 and not str(path).endswith((".pt", ".tmp")):
        raise UserError(f"{path} is a hard link, so that a run would write elsewhere too; copy it")


def _identity(path):
    """What tells a folder from another that has its name later; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def write_temporary(path, data):
    """Write bytes to a new temporary file in the folder of `path`, and flush it to disk. Returns its path.

    If it cannot be written, deletes it and raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # x: O_EXCL, so it is never written through a link
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


@contextlib.contextmanager
def reading(path):
    """Inside, where the content of a run's file is used, an error of any kind becomes one line that names the file."""
    try:
        yield
    except (UserError, GenotypeError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a file of a stranger's leads to: a missing key, a wrong type, a huge number
        text = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not as this program writes it ({shown(text)})") from None


def read_json(path):
    """The content of a JSON file; None if there is no such file. Raises UserError if it cannot be read."""
    path = Path(path)
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        raise UserError(
            f"{path} is not a file that this program wrote: it is {'too large' * path.is_file() or 'no file'}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {shown(str(error))}") from None


def write_json(path, content):
    """Write a JSON file atomically: at any time, `path` is the old or the new file, even if the process is killed.

    Raises OSError if it cannot be written; then the old file remains.
    """
    os.replace(write_temporary(path, (json.dumps(content, indent=2) + "\n").encode()), path)


def launcher():
    """A unique identifier of the parent process: host, process id and start time.

    It is the same after torchrun restarts its ranks. torchrun's own count of restarts cannot be used instead: it does
    not count restarts that ranks on another machine caused.
    """
    parent = os.getppid()
    status = Path(f"/proc/{parent}/stat")  # Linux only; field 22 is the start time
    started = status.read_text().rpartition(")")[2].split()[19] if status.is_file() else ""
    return f"{socket.gethostname()} {parent} {started}"
