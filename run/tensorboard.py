"""TensorBoard's event files: written without a queue; a full disk does not end the run."""

import os
import sys
import time

from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter

from command_line.errors import UserError


def alpha_tag(kind, node, source, op):
    """The tag of the weight of an operation on an edge. kind: the kind of cell, "normal" or "reduce"."""
    return f"alpha_{kind}/node{node}_from{source}/{op}"


def silent_writer():
    """A SummaryWriter that writes nothing."""
    return SummaryWriter(write_to_disk=False)


def event_writer(folder, purge_step=None):
    """A SummaryWriter of tensorboardX without its queue, whose events are lost when a run is killed.

    purge_step: TensorBoard discards all events of this step and later that are in older files.
    """
    try:
        writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=_unique_suffix())
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"no shared memory: {error.strerror}; /dev/shm must be writable") from None  # for the queue
    writer.file_writer.event_writer.close()
    writer.file_writer.event_writer = _EventFile(folder)
    return writer


def _unique_suffix():
    return f".{os.getpid()}.{time.time_ns()}"


class _EventFile:
    """An event file. If the disk is full, events are lost and the run continues; the next flush opens a new file."""

    def __init__(self, folder):
        self.folder = folder
        self.file = None
        self._open()

    def get_logdir(self):
        return str(self.folder)

    def add_event(self, event):
        if self.file is not None:
            self._try(self.file.write_event, event)

    def flush(self):
        self._try(self._open if self.file is None else self.file.flush)

    def close(self):
        if self.file is not None:
            self._try(self.file.close)
            self.file = None

    def _open(self):
        self.file = EventsWriter(str(self.folder / "events"), _unique_suffix())

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            self.file = None
            print(f"warning: TensorBoard's events could not be written: {error}", file=sys.stderr)
