"""Measures a run's time: throughput, goodput, waiting for data, step times, FLOP utilisation, memory."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cnx2_jax.types import Metrics

# Metrics that depend on the machine. All others are a function of the config and the step.
TIMED = re.compile(r"images_per_sec|goodput|data_wait|flop_utilisation|step_seconds_.*|memory_.*")


class Observer:
    """Measures one run from its start. `values` returns the measurements since its last call.

    Args:
      batch_size: images per update, for throughput.
      now: a clock in seconds that never goes backwards.
    """

    def __init__(self, batch_size: int, now: Callable[[], float] = time.monotonic):
        self._batch_size = batch_size
        self._now = now
        self._begin = self._since = self._landed = now()
        self._trained = 0.0  # seconds in updates since the run began
        self._updates = 0
        self._waited = 0.0
        self._rate = 0.0
        self._intervals: list[float] = []
        self._earlier: list[float] = []  # intervals of earlier windows
        self._at_peak: float | None = None

    def expect(self, seconds_at_peak: float) -> None:
        """Sets the seconds that an update would take at the devices' peak FLOP/s."""
        self._at_peak = seconds_at_peak

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data."""
        begin = self._now()
        yield
        self._waited += self._now() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block (evaluation, saving) out of every measurement but goodput."""
        begin = self._now()
        yield
        self._landed += self._now() - begin
        self._since += self._now() - begin

    def landed(self) -> None:
        """Counts a finished update; the first one compiles, so its time is not measured."""
        now = self._now()
        if self._updates:
            self._intervals.append(now - self._landed)
            self._trained += now - self._landed
        else:
            self._since, self._waited = now, 0.0
        self._updates += 1
        self._landed = now

    def values(self) -> Metrics:
        """Returns the measurements since the last call.

        Returns:
          `images_per_sec`: the last known value if no update was done. `goodput`: share of the time since
          the run began that was spent in updates. `data_wait`: share of the time that the host waited for
          data. `step_seconds_p50`, `_p90`, `_p99`: percentiles of the step time. `flop_utilisation`: share
          of the devices' peak FLOP/s, if the peak is known (see `flops`). `memory_peak_gib`: the largest
          peak memory of this host's devices, if they report it.
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
        """Returns one line of text about the whole run."""
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
