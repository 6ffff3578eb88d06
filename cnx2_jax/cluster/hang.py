"""Ends a run that makes no progress, and prints where it hangs."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cnx2_jax.errors import RunError
from cnx2_jax.files import replacing

STDERR = 2  # the file descriptor: sys.stderr may have been replaced
GRACE_SECONDS = 60  # time for Python to print the stacks before the hard timer kills the process


class HangWatch:
    """Ends the process after a time without progress, and prints the stacks of all its threads.

    The stacks go to standard error and to `stacks-PROCESS.txt` in the workdir. The exit status is 1, so
    launchers start the process again.

    Args:
      seconds: longest time without progress, compilation included; 0 turns the watch off.
      workdir: the run's folder.
      process_index: index of this process.
    """

    def __init__(self, seconds: float, workdir: Path, process_index: int):
        self._seconds = seconds
        self._path = workdir / f"stacks-{process_index}.txt"
        self._progressed_at = time.monotonic()
        self._suspended = False
        self._closed = threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="cnx2-hang").start()
        return self

    def __exit__(self, *_):
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def progressed(self) -> None:
        """Restarts the time without progress."""
        self._progressed_at = time.monotonic()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Lets the block take any time."""
        self._suspended = True
        yield
        self.progressed()
        self._suspended = False

    def _watch(self) -> None:
        pause = self._seconds / 10
        while True:
            # A thread that holds the interpreter lock stops this loop too. This timer runs without the lock.
            faulthandler.dump_traceback_later(self._seconds + pause + GRACE_SECONDS, exit=True, file=STDERR)
            if self._closed.wait(pause):
                return
            idle = time.monotonic() - self._progressed_at
            if idle > self._seconds and not self._suspended:
                self._end(idle)

    def _end(self, idle: float) -> None:
        line = f"cnx2: stopped: no progress for {idle:.0f} s (hang_seconds {self._seconds:g})"
        faulthandler.dump_traceback(STDERR)
        print(f"{line}; stacks are above and in '{self._path}'", file=sys.stderr, flush=True)
        # Writing the file may hang for the same reason as the run.
        faulthandler.dump_traceback_later(GRACE_SECONDS, exit=True, file=STDERR)
        try:
            with replacing(self._path) as partial, partial.open("w") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except (OSError, RunError) as error:
            print(f"cannot write '{self._path}': {error}", file=sys.stderr)
        os._exit(1)
