"""What the processes of a run tell each other besides arrays: who failed, and where to stop.

Both go through the key-value store of JAX's coordinator, which process 0 serves, and cost a step nothing:
threads sleep in a request for a key that nobody sets.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback

from cnx2_jax.cluster.store import shared_store
from cnx2_jax.errors import UserError, report

ROLL_CALL_SECONDS = 3.0  # in which a living process answers an alarm
READING_SECONDS = 1.0  # that process 0 serves the verdict before it ends, and the store with it
STOP_SECONDS = 60.0  # in which all living processes answer a request to stop
GO_ON = "the same command goes on with the run"
_EVER_MS = 2**31 - 1

_NAME, _BEAT, _ALARM = "cnx2/name", "cnx2/beat", "cnx2/alarm"
_PRESENT, _VERDICT = "cnx2/present", "cnx2/verdict"
_STOP, _STOP_AT = "cnx2/stop", "cnx2/stop_at"


class Watch:
    """Ends this process when another one fails or is gone, with a line that names it.

    A process that fails raises the alarm, and process 0 does when one gives no sign; all that live answer;
    those that do not are the ones to name.

    Args:
      index, count: of the processes.
      silence: seconds that a process may give no sign.
    """

    def __init__(self, index: int, count: int, silence: float):
        self._index, self._count, self._silence = index, count, silence
        self._heard: dict[str, tuple[str, float]] = {}  # the last sign of each process, and when it came
        self._store = shared_store()
        self._error: BaseException | None = None
        self._leaving = False
        self._store.key_value_set(f"{_NAME}/{index}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._thread = threading.Thread(target=self._listen, daemon=True, name="cnx2-watch")
        self._thread.start()

    def leave(self) -> None:
        """Says that all is well: that the store goes away from now on means nothing."""
        self._leaving = True

    def fail(self, error: BaseException) -> None:
        """Raises the alarm for this process's own error, and ends the process; does not return."""
        self._error = error
        with contextlib.suppress(Exception):  # process 0 is gone: the thread knows
            self._alarm(_first_line(error), 2 if isinstance(error, UserError) else 1)
        self._thread.join(4 * ROLL_CALL_SECONDS)
        self._end(_explain(error))

    def _listen(self) -> None:
        try:
            alarm = self._wait_for_alarm()
            self._store.key_value_set(f"{_PRESENT}/{self._index}", "")
            if self._index == 0:
                self._store.key_value_set(_VERDICT, json.dumps({**alarm, "missing": self._missing()}))
            verdict = json.loads(self._store.blocking_key_value_get(_VERDICT, int(4e3 * ROLL_CALL_SECONDS)))
        except Exception as error:
            if self._leaving:
                return
            self._lost(_first_line(error))
        status = verdict["status"]
        if verdict["missing"]:
            self._say(f"{self._named(verdict['missing'])} of {self._count} gone without a word; {GO_ON}")
        elif self._error is not None:
            status = _explain(self._error)
        else:
            name = self._named([verdict["by"]])
            self._say(f"{name} of {self._count} ended: {verdict['text']}")
        if self._index == 0:
            time.sleep(READING_SECONDS)
        self._end(status)

    def _alarm(self, text: str, status: int) -> None:
        with contextlib.suppress(ValueError, RuntimeError):  # there is one already
            alarm = {"by": self._index, "text": text, "status": status}
            self._store.key_value_set(_ALARM, json.dumps(alarm))

    def _wait_for_alarm(self) -> dict:
        """Gives signs, and in process 0 looks for those of the others, until there is an alarm."""
        for beat in itertools.count():
            # A frozen process 0 would keep the request for as long as JAX lets it.
            timer = threading.Timer(self._silence, self._lost, [f"no sign for {self._silence:g} s"])
            timer.daemon = True
            timer.start()
            self._store.key_value_set(f"{_BEAT}/{self._index}", str(beat), allow_overwrite=True)
            timer.cancel()
            if self._index == 0:
                self._look_for_signs()
            try:
                return json.loads(self._store.blocking_key_value_get(_ALARM, int(1e3 * self._silence / 4)))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise AssertionError

    def _lost(self, reason: str) -> None:
        self._say(f"process 0 of {self._count} is gone or out of reach ({reason}); {GO_ON}")
        self._end(1)

    def _look_for_signs(self) -> None:
        now = time.monotonic()
        for process, beat in self._store.key_value_dir_get(_BEAT):
            last, at = self._heard.get(process, ("", now))
            if beat != last:
                self._heard[process] = beat, now
            elif now - at > self._silence:
                self._alarm(f"{process} gave no sign for {now - at:.0f} s", 1)

    def _missing(self) -> list[int]:
        """Waits for the others' answers; returns who gave none."""
        until = time.monotonic() + ROLL_CALL_SECONDS
        while True:
            answers = self._store.key_value_dir_get(_PRESENT)
            missing = set(range(self._count)) - {int(key.rpartition("/")[2]) for key, _ in answers}
            if not missing or time.monotonic() > until:
                return sorted(missing)
            time.sleep(0.1)

    def _named(self, processes: list[int]) -> str:
        names = []
        for index in processes:
            place = self._store.key_value_try_get(f"{_NAME}/{index}")
            names.append(f"process {index} ({place})")
        return " and ".join(names)

    def _say(self, text: str) -> None:
        print(f"cnx2: stopped: {text}", file=sys.stderr)

    def _end(self, status: int) -> None:
        # Not sys.exit: this is a thread, and the main one may wait for the dead for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Agreement:
    """Brings all processes to stop at the same point of their common course.

    Every process counts its points, which are the same for all. When one is asked to stop, each tells how
    far it has come and waits; the point after the farthest is where all stop.
    """

    def __init__(self, index: int):
        self._index = index
        self._store = shared_store()
        self._lock = threading.Lock()
        self._point = 0
        self._stop_at: int | None = None
        threading.Thread(target=self._listen, daemon=True, name="cnx2-stop").start()

    def ask(self) -> None:
        """Asks all processes to stop."""
        self._store.key_value_set(_STOP, "", allow_overwrite=True)

    def reached(self) -> bool:
        """Counts a point; says whether all stop at it, or have before."""
        with self._lock:
            self._point += 1
            return self._stop_at is not None and self._point >= self._stop_at

    def _listen(self) -> None:
        try:
            self._store.blocking_key_value_get(_STOP, _EVER_MS)
            with self._lock:  # no further point before all know where to stop
                self._store.key_value_set(f"{_STOP_AT}/{self._index}", str(self._point))
                self._store.wait_at_barrier(_STOP, int(1e3 * STOP_SECONDS))
                points = [int(value) for _, value in self._store.key_value_dir_get(_STOP_AT)]
                self._stop_at = max(points) + 1
        except Exception as over:  # the run has ended, or another process has: then there is nothing to agree
            del over


def _explain(error: BaseException) -> int:
    """Prints what ended this process; returns its exit status."""
    try:
        return report(error)
    except BaseException:
        traceback.print_exception(error)
        return 1


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
