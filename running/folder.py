"""The folder of a run: the names of its files, and the operations on the folder as a whole.

This module does not import torch, so that command lines are read without it.
"""

import json
import os
import shutil
import socket
from pathlib import Path

from running.errors import UserError


class RunFolder:
    """The folder of a run, with the path of each of its files as an attribute. Creates and reads nothing.

    path: `RUNS_PATH/search/NAME` or `RUNS_PATH/augment/NAME`.
    """

    def __init__(self, path):
        self.path = Path(path)

        self.config = self.path / "config.json"  # the options
        self.launcher = self.path / "launcher.txt"  # identifies the process that started the run, see `launcher`

        self.checkpoint = self.path / "checkpoint.pt"  # the last
        self.previous = self.path / "previous.pt"  # the one before
        self.best = self.path / "best.pt"  # the checkpoint of the epoch with the best accuracy

        self.log = self.path / "log.txt"
        self.tensorboard = self.path / "tb"  # a folder of event files
        self.plots = self.path / "plots"  # a folder of pictures of cells
        self.genotype = self.path / "genotype.json"  # search only: the genotypes of the last and of the best epoch
        self.history = self.path / "history.json"  # search only: genotype and validation accuracy of each epoch
        self.summary = self.path / "summary.json"  # the results, written at the end of the run
        self.fault = self.path / "fault.json"  # the batches of the step whose loss or gradient was not finite
        self.report = self.path / "report.html"

    def __str__(self):
        return str(self.path)

    def check_free(self, overwrite):
        """Raise UserError unless a new run may use this folder: it is free, or holds a run that may be overwritten."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self} is a file; choose another --name")
        if all(path.suffix == ".tmp" or path == self.launcher for path in self.path.iterdir()):
            return  # left by a run that was killed before it wrote config.json
        if not self.config.is_file():
            raise UserError(f"{self} holds files that are no run's; choose another --name")
        if not overwrite:
            resume = f"go on with --resume {self}, " if self.checkpoint.is_file() else ""
            raise UserError(
                f"{self} already holds a run; {resume}replace it with --overwrite, or choose another --name"
            )

    def create(self, options, overwrite):
        """Create the folder if necessary, and write config.json. With `overwrite`, delete the old contents first."""
        if overwrite and self.path.is_dir():
            self.delete()
        self.plots.mkdir(parents=True, exist_ok=True)
        self.launcher.write_text(launcher())
        write_json(self.config, options)

    def delete(self):
        shutil.rmtree(self.path, ignore_errors=True)

    def check_room(self):
        """Raise OSError unless the disk has room for three checkpoints and for a fourth while it is written.

        To be called after the first checkpoint is saved. Later ones are assumed to be twice as large, since they
        contain the optimizers' buffers.
        """
        needed = 4 * 2 * self.checkpoint.stat().st_size
        free = shutil.disk_usage(self.path).free
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


def write_temporary(path, data):
    """Write bytes to a temporary file in the folder of `path`, and flush it to disk. Returns its path, to be renamed.

    If it cannot be written, deletes it and raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_json(path, content):
    """Write a JSON file atomically: at any time, `path` is the old or the new file, even if the process is killed.

    Raises OSError if it cannot be written; then the old file remains.
    """
    os.replace(write_temporary(path, (json.dumps(content, indent=2) + "\n").encode()), path)


def read_json(path):
    """The contents of a JSON file; None if it does not exist or cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def launcher():
    """A unique identifier of the parent process: host, process id and start time.

    It is the same after torchrun restarts its ranks. torchrun's own count of restarts cannot be used instead: it does
    not count restarts that ranks on another machine caused.
    """
    parent = os.getppid()
    status = Path(f"/proc/{parent}/stat")  # Linux only; field 22 is the start time
    started = status.read_text().rpartition(")")[2].split()[19] if status.is_file() else ""
    return f"{socket.gethostname()} {parent} {started}"
