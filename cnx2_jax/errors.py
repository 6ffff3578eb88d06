"""The exceptions that end a command with one line instead of a traceback."""

import difflib
import os
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: a wrong key, path, size or file.

    The command line prints its message as one line and exits with status 2. The message says what is
    wrong, with the offending value, and what to do.
    """


class RunError(Exception):
    """A run that cannot go on though nothing was asked wrongly, such as a non-finite loss; exit status 1."""


def tell(error: BaseException) -> int:
    """Prints what ended a command as one line, and returns its exit status.

    Raises:
      BaseException: the error itself, if it is none that a command is meant to end with.
    """
    match error:
        case UserError():
            print(f"cnx2: error: {error}", file=sys.stderr)
            return 2
        case RunError():
            print(f"cnx2: stopped: {error}", file=sys.stderr)
            return 1
        case BrokenPipeError():
            # Who read the output, such as `head`, has seen enough; Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case KeyboardInterrupt():
            print("cnx2: interrupted", file=sys.stderr)
            return 130
    raise error


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known name closest to `word`, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
