"""Robust standard output and error: they may be closed, a full disk, a broken pipe, or have a limited encoding.

Output that cannot be written is dropped. The run continues, and log.txt has the output.
"""

import contextlib
import os
import sys


@contextlib.contextmanager
def surviving_output():
    """Inside, a failure to write to standard output or error does not stop the program."""
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Survivor(sys.stdout, "standard output"), _Survivor(sys.stderr, "standard error")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_closed_ones():
    """Open the null device for closed descriptors 0 to 2, since a file of the run could get their number otherwise."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- open until the process ends


class _Survivor:
    """A text stream that drops what it cannot write. Characters that its encoding lacks are written as escapes."""

    def __init__(self, stream, name):
        self.stream, self.name = stream, name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed
            self._give_up(error)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except ValueError:  # closed, so nothing is left to be written; at exit, logging flushes what it has written to
            pass
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error):
        """Redirect the stream to the null device. Warn if it is standard output, except for a broken pipe."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if not isinstance(error, BrokenPipeError) and self.name == "standard output":
            print(f"warning: {self.name} cannot be written any more: {error}", file=sys.stderr)

    def __getattr__(self, attribute):
        return getattr(self.stream, attribute)
