"""One-line errors and exit statuses, for `cnx2` and the studies of experiments/."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from cnx2_jax.errors import RunError, UserError, report


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def count(text: str) -> int:
    """Reads a whole number from 1 on, as an argument's `type`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def run(main: Callable[[], int | None], name: str = "cnx2") -> int:
    """Calls `main` and returns its exit status, 0 where it returns None.

    An error that a user can act on is printed as one line that starts with `name`; see `errors.report`.
    """
    try:
        return main() or 0
    except (UserError, RunError, BrokenPipeError, KeyboardInterrupt) as error:
        return report(error, name)
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        print(f"{name}: error: '{error.filename}': {error.strerror}", file=sys.stderr)
        return 2
