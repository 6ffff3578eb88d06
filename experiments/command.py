"""What scripts here have in common with the command `cnx2`: errors of one line, and their exit status."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from cnx2_jax.errors import RunError, UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def count(text: str) -> int:
    """Reads a whole number from 1 on, as an argument's `type`."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def run(name: str, main: Callable[[], int | None]) -> int:
    """Calls `main` and returns its exit status, 0 where it returns none.

    What goes wrong is told in one line: a UserError and a file or folder that cannot be had are status 2, a
    RunError is 1.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: stopped: {error}", file=sys.stderr)
        return 1
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        print(f"{name}: error: '{error.filename}': {error.strerror}", file=sys.stderr)
        return 2
