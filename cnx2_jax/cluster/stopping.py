"""When a run stops before its end: a signal asks for it, and all processes do at the same point."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import jax
from tqdm import tqdm

from cnx2_jax.cluster.peers import Agreement


class StopAskedError(Exception):
    """Raised inside an evaluation when the run is to stop."""


class StopRequest:
    """Turns SIGINT and SIGTERM, to any process, into a stop; a second SIGINT ends the process at once.

    SIGTERM is also how schedulers give notice of a preemption.

    Args:
      passing: called at every point, for whoever watches that the run moves.
    """

    def __init__(self, passing: Callable[[], None]):
        self._passing = passing
        self._asked = self._reached = False
        self._agreement = Agreement(jax.process_index()) if jax.process_count() > 1 else None
        self._old: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self._asked = True
        if self._agreement is not None:
            self._agreement.ask()
        name = signal.Signals(number).name
        tqdm.write(f"{name}: saving and stopping; Ctrl-C stops without saving", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def reached(self) -> bool:
        """Passes a point of the run, at which all processes come by; says whether the run stops there."""
        self._passing()
        stop = self._asked if self._agreement is None else self._agreement.reached()
        self._reached = self._reached or stop
        return self._reached

    def check(self, batches: Iterable) -> Iterator:
        """Passes batches on, each one a point.

        Raises:
          StopAskedError: the run is to stop.
        """
        for batch in batches:
            if self.reached():
                raise StopAskedError
            yield batch
