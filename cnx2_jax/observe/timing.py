"""Where a run's time goes: throughput, goodput, waiting for data, step times, FLOPs, memory, traces."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cnx2_jax.types import Metrics

# What is a matter of time and place: all other metrics are a function of the config and the step.
TIMED = re.compile(r"images_per_sec|goodput|data_wait|flop_utilisation|step_seconds_.*|memory_.*")


class Observer:
    """Measures one run from its start; `values` says what happened since it was last asked.

    Args:
      batch_size: images per update, for throughput.
      now: seconds of a clock that does not go back.
    """

    def __init__(self, batch_size: int, now: Callable[[], float] = time.monotonic):
        self._batch_size = batch_size
        self._now = now
        self._begin = self._since = self._landed = now()
        self._trained = 0.0  # in updates, since the run began
        self._updates = 0
        self._waited = 0.0
        self._rate = 0.0
        self._intervals: list[float] = []
        self._earlier: list[float] = []  # intervals of former windows
        self._at_peak: float | None = None

    def expect(self, seconds_at_peak: float) -> None:
        """Says how long an update would take at the devices' peak FLOP/s, where that is known."""
        self._at_peak = seconds_at_peak

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        begin = self._now()
        yield
        self._waited += self._now() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what happens inside (evaluation, saving) out of all but goodput, which pays for it."""
        begin = self._now()
        yield
        self._landed += self._now() - begin
        self._since += self._now() - begin

    def landed(self) -> None:
        """Says that one more update is done. The first one compiles: no step time, and no goodput."""
        now = self._now()
        if self._updates:
            self._intervals.append(now - self._landed)
            self._trained += now - self._landed
        else:
            self._since, self._waited = now, 0.0
        self._updates += 1
        self._landed = now

    def values(self) -> Metrics:
        """Returns what was measured since the last call.

        Returns:
          `images_per_sec`, the last known where no update was done. `goodput`: share of the time since the
          run began in which it trained. `data_wait`: share of the time in which the host waited for data.
          `step_seconds_p50`, `_p90`, `_p99`. `flop_utilisation`: share of the devices' peak FLOP/s that the
          updates made use of, where it is known (`flops`). `memory_peak_gib`: the most that any device here
          held, where devices say so.
        """
        now = self._now()
        if self._intervals:
            self._rate = self._batch_size * len(self._intervals) / sum(self._intervals)
        values: Metrics = {"images_per_sec": self._rate, "goodput": self._goodput(now)}
        values["data_wait"] = self._waited / max(now - self._since, 1e-9)
        values |= _percentiles(self._intervals)
        values |= self._utilisation(self._intervals)
        values |= _memory()
        self._earlier += self._intervals
        self._intervals, self._waited, self._since = [], 0.0, now
        return {name: float(f"{value:.6g}") for name, value in values.items()}

    def summary(self) -> str:
        """Returns a line about the whole run."""
        line = f"goodput {self._goodput(self._now()):.0%}"
        intervals = self._earlier + self._intervals
        times = _percentiles(intervals)
        if times:
            line += ", step " + ", ".join(
                f"{name[-3:]} {1000 * value:.1f} ms" for name, value in times.items()
            )
        line += "".join(f", {value:.1%} of peak FLOP/s" for value in self._utilisation(intervals).values())
        line += "".join(f", {value:.1f} GiB at most on a device" for value in _memory().values())
        return line

    def _utilisation(self, intervals: list[float]) -> Metrics:
        if self._at_peak is None or not intervals:
            return {}
        return {"flop_utilisation": self._at_peak * len(intervals) / sum(intervals)}

    def _goodput(self, now: float) -> float:
        return self._trained / max(now - self._begin, 1e-9)


def _percentiles(seconds: list[float]) -> Metrics:
    if not seconds:
        return {}
    return {f"step_seconds_p{p}": float(np.percentile(seconds, p)) for p in (50, 90, 99)}


def _memory() -> Metrics:
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [known["peak_bytes_in_use"] for known in stats if known and "peak_bytes_in_use" in known]
    return {"memory_peak_gib": max(peaks) / 2**30} if peaks else {}
