"""Stops a run before its end: a signal requests it, and all processes stop at the same point."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
from tqdm import tqdm

from cnx2_jax.cluster.peers import Agreement


class StopAskedError(Exception):
    """Raised inside an evaluation when the run must stop."""


class StopRequest:
    """Turns SIGINT and SIGTERM to any process into a stop of all; a second SIGINT ends the process at once.

    Schedulers also send SIGTERM as the notice of a preemption.

    Args:
      on_point: called at every point, such as the hang watch's `progressed`.
    """

    def __init__(self, on_point: Callable[[], None]):
        self._on_point = on_point
        self._asked = self._reached = False
        self._agreement = Agreement(jax.process_index()) if jax.process_count() > 1 else None
        self._previous_handlers: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self._asked = True
        if self._agreement is not None:
            self._agreement.ask()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: saving and stopping; Ctrl-C stops without saving", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def reached(self) -> bool:
        """Passes one point of the run and returns whether the run stops here.

        All processes must call this the same number of times.
        """
        self._on_point()
        stop = self._asked if self._agreement is None else self._agreement.reached()
        self._reached = self._reached or stop
        return self._reached

    def check(self, batches: Iterable) -> Iterator:
        """Yields the batches; each one is a point.

        Raises:
          StopAskedError: the run must stop.
        """
        for batch in batches:
            if self.reached():
                raise StopAskedError
            yield batch
