"""The exceptions that end a command with one line instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: a wrong key, path, size or file.

    The command line prints its message as one line and exits with status 2. The message says what is
    wrong, with the offending value, and what to do.
    """


class RunError(Exception):
    """A run that cannot go on though nothing was asked wrongly, such as a non-finite loss; exit status 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known name closest to `word`, or the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
