"""Standard output and error, whatever they are: closed, full, a pipe that nobody reads, of another encoding.

What cannot be written there is lost; the run goes on, and its log has it.
"""

import contextlib
import os
import sys


@contextlib.contextmanager
def surviving_output():
    """Inside, what is written to standard output and error never ends the program."""
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
    """Let the descriptors 0 to 2 be the null device where they are closed: a file of the run must not get one."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- as long as the process lives


class _Survivor:
    """A text stream that loses what it cannot write. Letters that its encoding lacks are written as escapes."""

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
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error):
        """Send what is left, and all that follows, to the null device; say so unless it is a pipe that nobody reads."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if not isinstance(error, BrokenPipeError) and self.name == "standard output":
            print(f"warning: {self.name} cannot be written any more: {error}", file=sys.stderr)

    def __getattr__(self, attribute):
        return getattr(self.stream, attribute)
