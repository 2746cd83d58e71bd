"""A run's folder: the names of its files, and what is done to the folder as a whole.

Nothing here needs torch, so that command lines are read without it.
"""

import json
import os
import shutil
import socket
from pathlib import Path

from running.errors import UserError


class RunFolder:
    """The folder of a run, with the path of each of its files as an attribute. Nothing is created or read yet.

    path: `RUNS_PATH/search/NAME` or `RUNS_PATH/augment/NAME`.
    """

    def __init__(self, path):
        self.path = Path(path)

        self.config = self.path / "config.json"  # the options
        self.launcher = self.path / "launcher.txt"  # the process that started the run, see `launcher`

        self.checkpoint = self.path / "checkpoint.pt"  # the last
        self.previous = self.path / "previous.pt"  # the one before
        self.best = self.path / "best.pt"  # the one of the best epoch

        self.log = self.path / "log.txt"
        self.tensorboard = self.path / "tb"  # a folder of event files
        self.plots = self.path / "plots"  # a folder of pictures of cells
        self.genotype = self.path / "genotype.json"  # of a search: the last genotype and the best
        self.history = self.path / "history.json"  # of a search: each epoch's genotype and validation accuracy
        self.summary = self.path / "summary.json"  # the results, once the run is done
        self.fault = self.path / "fault.json"  # the batch whose loss or gradient was not finite
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
            return  # a run that was killed before it wrote anything
        if not self.config.is_file():
            raise UserError(f"{self} holds files that are no run's; choose another --name")
        if not overwrite:
            resume = f"go on with --resume {self}, " if self.checkpoint.is_file() else ""
            raise UserError(
                f"{self} already holds a run; {resume}replace it with --overwrite, or choose another --name"
            )

    def create(self, options, overwrite):
        """Create the folder, with the options in config.json; with `overwrite`, delete what it holds."""
        if overwrite and self.path.is_dir():
            self.delete()
        self.plots.mkdir(parents=True, exist_ok=True)
        self.launcher.write_text(launcher())
        write_json(self.config, options)

    def delete(self):
        shutil.rmtree(self.path, ignore_errors=True)

    def check_room(self):
        """Raise OSError unless there is room for a run's three checkpoints, and for the one that is being written.

        To be called when the start is saved. Later checkpoints are taken to be twice as large: they have the
        optimizers' buffers.
        """
        needed = 4 * 2 * self.checkpoint.stat().st_size
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(f"its checkpoints need {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    def log_size(self):
        """The length of the log, in bytes."""
        return self.log.stat().st_size if self.log.exists() else 0

    def event_sizes(self):
        """The lengths of TensorBoard's files: name -> bytes."""
        return {path.name: path.stat().st_size for path in self.tensorboard.glob("events.*")}

    def cut_off(self, log_size, event_sizes):
        """Shorten the log and TensorBoard's files to these lengths: what came after a checkpoint will be done again."""
        sizes = {self.log: log_size}
        sizes |= {path: event_sizes.get(path.name, 0) for path in self.tensorboard.glob("events.*")}
        for path, size in sizes.items():
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)


def write_temporary(path, data):
    """Write bytes to a temporary file beside `path`, flushed to disk; returns it, to be renamed.

    Raises OSError if it cannot be written, and leaves nothing then.
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
    """Write a JSON file atomically: a reader, or a kill, finds the old file or the new one, never a part.

    Raises OSError if it cannot be written; the old file stays then.
    """
    os.replace(write_temporary(path, (json.dumps(content, indent=2) + "\n").encode()), path)


def launcher():
    """The process that started this one: host, number and start time, which no two processes share.

    A restart by the same torchrun finds the same. torchrun's own count of restarts would not do: it leaves out those
    that another machine's ranks were the cause of.
    """
    parent = os.getppid()
    status = Path(f"/proc/{parent}/stat")  # on Linux; its 22nd field is when the process started
    started = status.read_text().rpartition(")")[2].split()[19] if status.is_file() else ""
    return f"{socket.gethostname()} {parent} {started}"
