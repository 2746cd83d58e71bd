"""Where a run writes what it shows: log.txt and the terminal, TensorBoard, and loggers of the user's."""

import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter

from run.folder import RunFolder


class Logger:
    """Gets all numbers, texts and pictures of a run, on rank 0. Override what you need; docs/changing.md has examples.

    A script passes its class, for example `search.main(loggers=[MyLogger])`; it is called with the run's folder and its
    options, an object such as `SearchConfig`. step: the number of optimizer steps of w since the start of the run. When
    a run is resumed, the steps after its checkpoint come again.
    """

    def __init__(self, folder: Path, config):
        pass

    def scalar(self, tag: str, value: float, step: int):
        """A number; docs/run-folder.md lists the tags."""

    def text(self, tag: str, text: str, step: int):
        """A text in Markdown."""

    def picture(self, tag: str, pixels: np.ndarray, step: int):
        """A picture, (height, width, 3), of bytes."""

    def flush(self):
        """Write to disk what was logged: the run is about to save a checkpoint."""

    def close(self):
        """The run ends."""


class TensorBoard(Logger):
    """TensorBoard's event files, in the run's folder.

    first_step: of a resumed run; events of this step and later that are in older files are void. Events are written at
    once: the queue of tensorboardX would block the run for ever if the disk were full.
    """

    def __init__(self, folder: Path, config, first_step: int | None = None):
        path = RunFolder(folder).tensorboard
        self.writer = SummaryWriter(str(path), purge_step=first_step)
        self.writer.file_writer.event_writer.close()  # the queue, and a first file that voids the older events
        self.writer.file_writer.event_writer = _EventFile(path)

    def scalar(self, tag, value, step):
        self.writer.add_scalar(tag, value, step)

    def text(self, tag, text, step):
        self.writer.add_text(tag, text, step)

    def picture(self, tag, pixels, step):
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def charts(self, charts: dict):
        """Group scalars into charts under TensorBoard's tab Custom Scalars, see `SummaryWriter.add_custom_scalars`."""
        self.writer.add_custom_scalars(charts)

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class _EventFile:
    """An event file. If it cannot be written, such as on a full disk, there is a warning and the run goes on."""

    def __init__(self, folder):
        self.folder = folder
        self.file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")

    def get_logdir(self):
        return str(self.folder)

    def add_event(self, event):
        self._try("write_event", event)

    def flush(self):
        self._try("flush")

    def close(self):
        self._try("close")
        self.file = None  # tensorboardX closes it again at exit

    def _try(self, method, *args):
        try:
            if self.file is not None:
                getattr(self.file, method)(*args)
        except OSError as error:
            self.file = None
            print(f"warning: TensorBoard's events could not be written: {error}", file=sys.stderr)


def get_logger(file_path: str | Path) -> logging.Logger:
    """The logger `darts`, which writes to standard output and appends to a file. Closes the handlers of earlier calls.

    Its messages do not go to the root logger, which libraries configure.
    """
    logger = logging.getLogger("darts")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (_Terminal(sys.stdout), _LogFile(file_path, encoding="utf-8")):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


class _WarnsOnce:
    """A handler that drops the lines it cannot write, with one warning: the run goes on."""

    warned = False

    def handleError(self, record):
        if not self.warned:
            self.warned = True
            print(f"warning: cannot write the log to {self.stream.name}: {sys.exc_info()[1]}", file=sys.stderr)


class _Terminal(_WarnsOnce, logging.StreamHandler):
    """Standard output, which may be a pipe whose reader has ended."""


class _LogFile(_WarnsOnce, logging.FileHandler):
    """log.txt."""
