"""The log of a run."""

import logging
import sys


def get_logger(file_path):
    """The logger `darts`, which writes to standard output and appends to a file. Closes the handlers of earlier calls.

    Its messages do not go to the root logger, which libraries configure.
    """
    logger = logging.getLogger("darts")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    form = logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (logging.StreamHandler(sys.stdout), _LogFile(file_path, encoding="utf-8")):
        handler.setFormatter(form)
        logger.addHandler(handler)
    return logger


class _LogFile(logging.FileHandler):
    """A log file. If a line cannot be written, as on a full disk, it is lost, and the run continues."""

    warned = False

    def handleError(self, record):
        if not self.warned:
            self.warned = True
            print(f"warning: cannot write to {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self):
        try:
            super().close()
        except OSError:
            self.stream = None
