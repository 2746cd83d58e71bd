"""Errors that the user can correct: printed as one line that says what is wrong and what is allowed."""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable

from models.genotype import GenotypeError

MAX_MESSAGE = 1500  # characters of a message that is printed


class UserError(ValueError):
    """An error in the input: an option, a file. Scripts print it in one line and exit with code 2.

    All ranks of a distributed run raise it alike, and rank 0 prints it.
    """


class ThisRankError(UserError):
    """An error that only this rank of a distributed run has, which therefore prints it."""


INPUT_ERRORS = (UserError, GenotypeError, OSError)  # an OSError's message names the file


@contextlib.contextmanager
def user_errors_in_one_line(program: str):
    """Turn an error of `INPUT_ERRORS` that is raised inside into one line on stderr and exit code 2.

    So is lack of memory. Ctrl-C exits with code 130, the loss of another rank with code 1, and output to a closed pipe
    ends the program silently. All other exceptions are bugs and keep their traceback.
    """
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its exit
        sys.exit(1)
    except INPUT_ERRORS as error:
        if is_rank_0() or not isinstance(error, UserError) or isinstance(error, ThisRankError):
            print(f"{program}: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        import torch  # here, since it takes seconds; when this runs, it is imported already

        text = one_line(str(error)[:200])
        if isinstance(error, torch.distributed.DistError) or "gloo" in text.lower():
            if is_rank_0():
                print(f"{program}: error: a rank of this run has ended, or cannot be reached ({text})", file=sys.stderr)
            sys.exit(1)
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "allocate memory" in text:
            lower = "lower --batch-size, --init-channels or --layers, or see --recompute and --amp in --help"
            print(f"{program}: error: out of memory: {lower} ({text})", file=sys.stderr)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def any_error_in_one_line(describe: Callable[[Exception], str], passes: tuple[type[Exception], ...] = ()):
    """Inside, where a file of anybody's is read, an error of any type becomes a UserError: describe(error).

    For readers that raise whatever a damaged file leads to. What says nothing of the file, and the types in `passes`,
    stay as they are.
    """
    try:
        yield
    except (UserError, GenotypeError, MemoryError, *passes):
        raise
    except Exception as error:
        raise UserError(describe(error)) from None


def is_rank_0() -> bool:
    """Whether this is rank 0 of torchrun's ranks, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str):
    """Print a warning to stderr, on rank 0 only."""
    if is_rank_0():
        print(f"warning: {one_line(text)}", file=sys.stderr)


def one_line(message: str) -> str:
    """The message as one line that a terminal can show. A very long one lacks its middle."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


def shell_quote(text: str) -> str:
    """The text as one word for a shell: in double quotes if it has single quotes, as a genotype, and these suffice."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors in one line, without the usage. The exit code is 2, as in argparse."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see --help)\n")
