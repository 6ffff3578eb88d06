"""Traces of selected updates."""

import contextlib
import re
from pathlib import Path

import jax

from cnx2_jax.errors import UserError
from cnx2_jax.files import made_in


class Profile:
    """Writes a trace of a range of updates into a folder, for TensorBoard and Perfetto.

    Args:
      steps: `FIRST:LAST`, the updates to trace, counted from 1; empty for none.
      folder: the folder to write to.

    Raises:
      UserError: `steps` is not of that form.
    """

    def __init__(self, steps: str, folder: Path):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", steps) if steps else None
        if steps and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f"profile_steps '{steps}' must be FIRST:LAST, such as 10:13")
        self._first, self._last = (int(match[1]), int(match[2])) if match else (0, -1)
        self._folder = folder
        self._running = False
        self._open = contextlib.ExitStack()

    def before(self, step: int) -> None:
        """Starts the trace if update number `step`, which has not started, is the first to trace."""
        if self._first <= step <= self._last and not self._running:
            # The profiler writes to local folders only.
            folder = self._open.enter_context(made_in(self._folder))
            self._open.callback(jax.profiler.stop_trace)
            jax.profiler.start_trace(str(folder))
            self._running = True

    def after(self, step: int) -> bool:
        """Returns whether the trace must be closed after update number `step`."""
        return self._running and step >= self._last

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            self._running = False
            self._open.close()
