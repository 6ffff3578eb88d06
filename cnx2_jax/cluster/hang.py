"""Ends a run that hangs, and shows where it does."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STDERR = 2  # the file itself, whatever Python's stands for
GRACE_SECONDS = 60  # that Python has to show and end it itself


class HangWatch:
    """Ends the process when nothing has moved for long, with the stacks of all its threads.

    They go to standard error and to `stacks-PROCESS.txt` in the workdir; the exit status is 1, so that
    whoever started the process does it again.

    Args:
      seconds: how long nothing may move, compilation included; 0: for ever.
      workdir: of the run.
      process_index: of this process.
    """

    def __init__(self, seconds: float, workdir: Path, process_index: int):
        self._seconds = seconds
        self._path = workdir / f"stacks-{process_index}.txt"
        self._moved_at = time.monotonic()
        self._aside = False
        self._over = threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="cnx2-hang").start()
        return self

    def __exit__(self, *_):
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def moved(self) -> None:
        """Says that the run is alive."""
        self._moved_at = time.monotonic()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Lets what is inside take as long as it likes."""
        self._aside = True
        yield
        self.moved()
        self._aside = False

    def _watch(self) -> None:
        pause = self._seconds / 10
        while True:
            # Should something hold the interpreter, so that not even this loop goes round.
            faulthandler.dump_traceback_later(self._seconds + pause + GRACE_SECONDS, exit=True, file=STDERR)
            if self._over.wait(pause):
                return
            still = time.monotonic() - self._moved_at
            if still > self._seconds and not self._aside:
                self._end(still)

    def _end(self, still: float) -> None:
        line = f"cnx2: stopped: nothing moved for {still:.0f} s (hang_seconds {self._seconds:g})"
        try:
            with self._path.open("w") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError as error:
            print(f"cannot write '{self._path}': {error.strerror}", file=sys.stderr)
        faulthandler.dump_traceback(STDERR)
        print(f"{line}; stacks are above and in '{self._path}'", file=sys.stderr, flush=True)
        os._exit(1)
