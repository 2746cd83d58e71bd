"""The folder of a run: the names of its files, and the operations on the folder as a whole.

This module does not import torch, so that command lines are read without it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line.errors import UserError, any_error_in_one_line


class RunFolder:
    """The folder of a run, with the path of each of its files as an attribute. Creates and reads nothing.

    path: `RUNS_PATH/search/NAME` or `RUNS_PATH/augment/NAME`.
    """

    _lock = None  # the lock that this process holds

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"  # the options
        self.lock_file = self.path / "lock"  # locked by the process that writes to the folder

        self.checkpoint = self.path / "checkpoint.pt"  # the last
        self.best = self.path / "best.pt"  # the checkpoint of the epoch with the best accuracy

        self.log = self.path / "log.txt"
        self.tensorboard = self.path / "tb"  # a folder of event files
        self.plots = self.path / "plots"  # a folder of pictures of cells
        self.genotype = self.path / "genotype.json"  # search only: the genotype that it gives, and the best epoch's
        self.history = self.path / "history.json"  # search only: genotype and validation accuracy of each epoch
        self.summary = self.path / "summary.json"  # the results, written at the end of the run
        self.report = self.path / "report.html"

    def __str__(self):
        return str(self.path)

    def check(self):
        """Raise UserError if there are links in the folder, through which a run would write elsewhere."""
        links = [path for path in Path(self.path).rglob("*") if path.is_symlink()]
        if links:
            raise UserError(f"{links[0]} is a link; a run's folder may not contain links")

    def check_free(self, overwrite: bool):
        """Raise UserError unless a new run may use this folder: it is free, or holds a run that may be overwritten."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.config.is_file():
            raise UserError(f"{self} is not the folder of a run; choose another --name")
        if not overwrite:
            raise UserError(
                f"{self} already holds a run; go on with --resume {self}, replace it with --overwrite, or choose "
                "another --name"
            )
        if self.path.is_symlink():
            raise UserError(f"{self} is a link to a folder, which --overwrite does not replace; delete it yourself")

    def lock(self):
        """Keep other processes out of the folder until `unlock`. Raises UserError if another has locked it."""
        from filelock import FileLock, Timeout

        self.unlock()
        lock = FileLock(self.lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{self} is in use by another process; end that one, or choose another --name") from None
        self._lock = lock

    def unlock(self):
        """Let other processes write to the folder. No effect if there is no lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def create(self, options: dict, save: Callable[[Path], None], overwrite: bool):
        """Create the folder, with config.json and what `save(folder)` writes, and lock it.

        It is made under a temporary name and renamed, so that it never exists without these files. With `overwrite`
        the rename replaces the old run, which is therefore lost only when the new one has been saved.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new, old = (RunFolder(self.path.with_name(f".{self.path.name}.{word}")) for word in ("new", "old"))
        for rest in (new, old):  # of a command that was killed here
            shutil.rmtree(rest.path, ignore_errors=True)
        try:
            new.path.mkdir()
            write_json(new.config, options)
            new.plots.mkdir()
            save(new.path)
            new.lock()
            if overwrite and self.path.exists():
                os.rename(self.path, old.path)
            os.rename(new.path, self.path)
        finally:
            shutil.rmtree(new.path, ignore_errors=True)
            shutil.rmtree(old.path, ignore_errors=True)
        self.unlock()  # the old run, if there was one
        self._lock = new._lock


def write_atomically(path: Path, data: bytes):
    """Write a file: at any time `path` is the old file or the new one, never a part, even if the process is killed.

    Raises OSError if it cannot be written; then the old file remains.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any):
    """Write a JSON file atomically, see `write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def reading(path: str | Path):
    """Inside, where the content of a run's file is used, an error of any kind becomes one line that names the file."""

    def describe(error):
        return f"{path} is not as this program writes it ({f'{type(error).__name__}: {error}'[:100]})"

    with any_error_in_one_line(describe, passes=(FileNotFoundError, PermissionError)):
        yield


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; None if there is no such file. Raises UserError if it is not JSON."""
    path = Path(path)
    if not path.exists():
        return None
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))
