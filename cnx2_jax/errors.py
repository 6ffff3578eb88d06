"""The exceptions that end a command with one line instead of a traceback."""

import difflib
import os
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: a wrong key, path, size or file.

    The command line prints its message as one line and exits with status 2. The message gives the
    offending value, the rule, and what to do.
    """


class RunError(Exception):
    """A run that cannot continue although nothing was asked wrongly, such as on a non-finite loss.

    Exit status 1.
    """


def report(error: BaseException, name: str = "cnx2") -> int:
    """Prints the error that ended a command as one line, and returns the exit status.

    Raises:
      BaseException: the error itself, unless it is one that ends a command without a traceback.
    """
    match error:
        case UserError():
            print(f"{name}: error: {error}", file=sys.stderr)
            return 2
        case RunError():
            print(f"{name}: stopped: {error}", file=sys.stderr)
            return 1
        case BrokenPipeError():
            # The reader, such as `head`, has seen enough; Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        case KeyboardInterrupt():
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
    raise error


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known name closest to `word`, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
