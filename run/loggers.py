"""Where a run writes what it shows: log.txt and the terminal, TensorBoard, and loggers of the user's."""

import logging
import sys
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

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

    first_step: the next step of a resumed run; TensorBoard ignores events of this step and later in older files.
    """

    def __init__(self, folder: Path, config, first_step: int | None = None):
        self.writer = SummaryWriter(str(RunFolder(folder).tensorboard), purge_step=first_step)

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


def get_logger(file_path: str | Path) -> logging.Logger:
    """The logger `darts`, which writes to standard output and appends to a file. Closes the handlers of earlier calls.

    Its messages do not go to the root logger, which libraries configure. A line that cannot be written, such as one to
    a pipe whose reader has ended, is dropped.
    """
    logger = logging.getLogger("darts")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(file_path, encoding="utf-8")):
        handler.setFormatter(formatter)
        handler.handleError = lambda record: None
        logger.addHandler(handler)
    return logger
