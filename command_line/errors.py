"""Errors that the user can correct: printed as one line that says what is wrong and what is allowed."""

import argparse
import contextlib
import os
import reprlib
import shlex
import signal
import sys
import threading

from command_line.output import surviving_output
from models.genotype import GenotypeError

LESS_MEMORY = {
    "search.py": "lower --batch-size, --init-channels, --layers or --nodes, or give --recompute or --order first",
    "augment.py": "lower --batch-size, --init-channels or --layers, or give --amp",
}


MAX_MESSAGE = 1500  # characters of a message that is printed


class UserError(ValueError):
    """An error in the input: an option, a file, a genotype. Scripts print it in one line and exit with code 2."""


class OtherRankError(UserError):
    """A `UserError` that another rank prints: this rank exits silently."""


INPUT_ERRORS = (UserError, GenotypeError, OSError)  # an OSError's message names the file


def end_silently_on_interrupt():
    """Let Ctrl-C end the process without a traceback while torch is imported, until `user_errors_in_one_line`."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell lets background processes ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def user_errors_in_one_line(program):
    """Turn a `UserError` raised inside into one line on stderr and exit code 2.

    An OSError (a name too long, a folder without permission) is printed in the same way: its message names the file. If
    memory runs out, the message says which options to lower. Ctrl-C exits with code 130, the loss of another rank with
    code 1. All other exceptions are bugs and keep their traceback. Output that cannot be written is dropped, and does
    not stop the program.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # after `end_silently_on_interrupt`
    with surviving_output(), _errors_in_one_line(program):
        yield


@contextlib.contextmanager
def _errors_in_one_line(program):
    try:
        yield
    except OtherRankError:
        sys.exit(2)
    except INPUT_ERRORS as error:
        _exit(program, str(error))
    except (MemoryError, RuntimeError) as error:
        if _is_of_communication(error):
            _exit(program, f"a rank of this run has gone, or cannot be reached ({str(error)[:200]})", code=1)
        if not _is_out_of_memory(error):
            raise
        _exit(program, f"out of memory: {LESS_MEMORY.get(program, '')} ({str(error)[:200]})")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def _is_out_of_memory(error):
    """On CUDA this error has its own type; on the CPU it is a RuntimeError, known by its message."""
    import torch  # here, since it takes seconds; when this runs, it is imported already

    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in str(error)


def _is_of_communication(error):
    import torch

    known = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return known or "gloo" in str(error).lower()  # gloo raises a RuntimeError, known by its message


def is_rank_0():
    """Whether this is rank 0 of torchrun's ranks, or no rank at all; before the ranks have met."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def warn(text):
    """Print a warning to stderr, on rank 0 only."""
    if is_rank_0():
        print(f"warning: {one_line(text)}", file=sys.stderr)


def one_line(message):
    """The message as one line that a terminal can show. A long one, as of a stranger's file, lacks its middle."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


def shell_quote(text):
    """The text as one word for a shell: in double quotes if it has single quotes, as a genotype, and these suffice."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


def shown(value):
    """A value for a message: numbers and strings, shortened; of anything else the type."""
    is_short = value is None or isinstance(value, (str, float, bool)) or (type(value) is int and abs(value) < 10**20)
    return _SHORT.repr(value) if is_short else type(value).__name__


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def _exit(program, message, code=2):
    print(f"{program}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors in one line, without the usage. The exit code is 2, as in argparse."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")
