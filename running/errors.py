"""Errors that are the user's to mend: one line that says what was given and what is allowed."""

import argparse
import contextlib
import os
import sys

from running.output import surviving_output

LESS_MEMORY = {
    "search.py": "lower --batch-size, --init-channels, --layers or --nodes, or give --recompute or --order first",
    "augment.py": "lower --batch-size, --init-channels or --layers, or give --amp",
}


class UserError(ValueError):
    """A mistake in the input: an option, a file, a genotype. Scripts print it in one line and exit with 2."""


class OtherRankError(UserError):
    """A mistake that another rank of a distributed run tells the user of."""


@contextlib.contextmanager
def user_errors_in_one_line(program):
    """Turn a `UserError` raised inside into one line on stderr and exit code 2.

    So too what the operating system refuses, such as a name too long or a folder without permission: its message names
    the file. Running out of memory says what to lower. Ctrl-C exits with 130, losing another rank with 1. Other
    exceptions are a programmer's mistake and keep their traceback. Inside, output that cannot be written is lost and
    ends nothing.
    """
    with surviving_output(), _errors_in_one_line(program):
        yield


@contextlib.contextmanager
def _errors_in_one_line(program):
    try:
        yield
    except OtherRankError:
        sys.exit(2)
    except (UserError, OSError) as error:
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
    """CUDA's has a type of its own, the CPU's allocator has none."""
    import torch  # which takes seconds, and has been imported long before anything can fail so

    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in str(error)


def _is_of_communication(error):
    import torch

    known = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return known or "gloo" in str(error).lower()  # whose errors have no type of their own


def warn(text):
    """Print a warning to stderr, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def _exit(program, message, code=2):
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, without the usage; argparse exits with 2 as it is."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")
