"""Errors that are the user's to mend: one line that says what was given and what is allowed."""

import argparse
import contextlib
import sys


class UserError(ValueError):
    """A mistake in the input: an option, a file, a genotype. Scripts print it in one line and exit with 2."""


@contextlib.contextmanager
def user_errors_in_one_line(program):
    """Turn a `UserError` raised inside into one line on stderr and exit code 2.

    So too what the operating system refuses, such as a name too long or a folder without permission: its message names
    the file. Other exceptions are a programmer's mistake and keep their traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, without the usage; argparse exits with 2 as it is."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")
