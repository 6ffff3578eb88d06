"""Messages between the processes of a run: which one failed, and at which point all stop.

The messages use the key-value store of JAX's coordinator, which process 0 serves. They cost a step nothing:
threads block on a request for a key that is set only when something happens.
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

ANSWER_SECONDS = 3.0  # a live process answers an alarm within this time
READING_SECONDS = 1.0  # process 0 keeps the store open this long, so that the others can read the verdict
STOP_SECONDS = 60.0  # all live processes answer a stop request within this time
RESUME = "give the same command to resume"
_FOREVER_MS = 2**31 - 1

_NAME, _BEAT, _ALARM = "cnx2/name", "cnx2/beat", "cnx2/alarm"
_PRESENT, _VERDICT = "cnx2/present", "cnx2/verdict"
_STOP, _STOP_AT = "cnx2/stop", "cnx2/stop_at"


class PeerWatch:
    """Ends this process when another one fails or disappears, with a line that names it.

    A process that fails sets the alarm; process 0 sets it for one that misses its heartbeats. Every live
    process answers the alarm, and the line names those that do not answer.

    Args:
      index: of this process.
      count: number of processes.
      silence: seconds without a heartbeat after which a process counts as lost.
    """

    def __init__(self, index: int, count: int, silence: float):
        self._index, self._count, self._silence = index, count, silence
        self._heard: dict[str, tuple[str, float]] = {}  # the last heartbeat of each process, and its time
        self._store = shared_store()
        self._error: BaseException | None = None
        self._leaving = False
        self._store.key_value_set(f"{_NAME}/{index}", f"{socket.gethostname()}, pid {os.getpid()}")
        self._thread = threading.Thread(target=self._listen, daemon=True, name="cnx2-watch")
        self._thread.start()

    def leave(self) -> None:
        """Ends the watch without an error: from now on the store may close."""
        self._leaving = True

    def fail(self, error: BaseException) -> None:
        """Sets the alarm for this process's error and ends the process; does not return."""
        self._error = error
        with contextlib.suppress(Exception):  # process 0 is gone; the thread reports that
            self._set_alarm(_first_line(error), 2 if isinstance(error, UserError) else 1)
        self._thread.join(4 * ANSWER_SECONDS)
        self._end(_explain(error))

    def _listen(self) -> None:
        try:
            alarm = self._wait_for_alarm()
            self._store.key_value_set(f"{_PRESENT}/{self._index}", "")
            if self._index == 0:
                self._store.key_value_set(_VERDICT, json.dumps({**alarm, "missing": self._missing()}))
            verdict = json.loads(self._store.blocking_key_value_get(_VERDICT, int(4e3 * ANSWER_SECONDS)))
        except Exception as error:
            if self._leaving:
                return
            self._lost(_first_line(error))
        status = verdict["status"]
        if verdict["missing"]:
            self._say(f"{self._named(verdict['missing'])} of {self._count} disappeared; {RESUME}")
        elif self._error is not None:
            status = _explain(self._error)
        else:
            name = self._named([verdict["by"]])
            self._say(f"{name} of {self._count} failed: {verdict['text']}")
        if self._index == 0:
            time.sleep(READING_SECONDS)
        self._end(status)

    def _set_alarm(self, text: str, status: int) -> None:
        with contextlib.suppress(ValueError, RuntimeError):  # another process has set it
            alarm = {"by": self._index, "text": text, "status": status}
            self._store.key_value_set(_ALARM, json.dumps(alarm))

    def _wait_for_alarm(self) -> dict:
        """Sends heartbeats, and in process 0 checks those of the others, until an alarm is set."""
        for beat in itertools.count():
            # Writing to the store of a frozen process 0 blocks; JAX would wait much longer than `silence`.
            timer = threading.Timer(self._silence, self._lost, [f"no heartbeat for {self._silence:g} s"])
            timer.daemon = True
            timer.start()
            self._store.key_value_set(f"{_BEAT}/{self._index}", str(beat), allow_overwrite=True)
            timer.cancel()
            if self._index == 0:
                self._check_heartbeats()
            try:
                return json.loads(self._store.blocking_key_value_get(_ALARM, int(1e3 * self._silence / 4)))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        raise AssertionError

    def _lost(self, reason: str) -> None:
        self._say(f"process 0 of {self._count} is gone or unreachable ({reason}); {RESUME}")
        self._end(1)

    def _check_heartbeats(self) -> None:
        now = time.monotonic()
        for process, beat in self._store.key_value_dir_get(_BEAT):
            last, at = self._heard.get(process, ("", now))
            if beat != last:
                self._heard[process] = beat, now
            elif now - at > self._silence:
                self._set_alarm(f"{process} sent no heartbeat for {now - at:.0f} s", 1)

    def _missing(self) -> list[int]:
        """Waits for the answers and returns the indices of the processes that gave none."""
        until = time.monotonic() + ANSWER_SECONDS
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
        # Not sys.exit: this is a thread, and the main thread may block on a dead process for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Agreement:
    """Makes all processes stop at the same point.

    Every process counts its points, and all processes pass the same ones. After a stop request each process
    publishes its count and waits for the others; all stop one point after the largest count.

    Args:
      index: of this process.
    """

    def __init__(self, index: int):
        self._index = index
        self._store = shared_store()
        self._lock = threading.Lock()
        self._point = 0
        self._stop_at: int | None = None
        threading.Thread(target=self._listen, daemon=True, name="cnx2-stop").start()

    def ask(self) -> None:
        """Requests that all processes stop."""
        self._store.key_value_set(_STOP, "", allow_overwrite=True)

    def reached(self) -> bool:
        """Counts a point and returns whether all processes stop at it, or at an earlier one."""
        with self._lock:
            self._point += 1
            return self._stop_at is not None and self._point >= self._stop_at

    def _listen(self) -> None:
        try:
            self._store.blocking_key_value_get(_STOP, _FOREVER_MS)
            with self._lock:  # this process passes no point until all counts are known
                self._store.key_value_set(f"{_STOP_AT}/{self._index}", str(self._point))
                self._store.wait_at_barrier(_STOP, int(1e3 * STOP_SECONDS))
                points = [int(value) for _, value in self._store.key_value_dir_get(_STOP_AT)]
                self._stop_at = max(points) + 1
        except Exception:  # the run or another process has ended: no agreement is needed
            return


def _explain(error: BaseException) -> int:
    """Prints the error that ended this process and returns the exit status."""
    try:
        return report(error)
    except BaseException:
        traceback.print_exception(error)
        return 1


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
