"""Updates that were started but not yet checked, and what happens to one that is not finite."""

import collections
import math
from collections.abc import Callable

import jax

from cnx2_jax.errors import RunError
from cnx2_jax.observe.progress import say
from cnx2_jax.train.step import FINITE

STEPS_AHEAD = 2  # updates in flight: enough to hide the host's work, few enough to stop soon


class Flight:
    """Keeps track of the updates in flight. Nothing is saved or logged before all of them have landed.

    Args:
      max_nonfinite: skipped updates in a row at which the run stops.
      landed: called for each update that is done.
    """

    def __init__(self, max_nonfinite: int, landed: Callable[[], None]):
        self._max_nonfinite = max_nonfinite
        self._landed = landed
        self._flying: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()

    def start(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the update that leads to `step`, and waits for the oldest one if too many are in flight.

        Raises:
          RunError: see `land`.
        """
        self._flying.append((step, metrics))
        self._wait(STEPS_AHEAD)

    def land(self) -> None:
        """Waits until no update is in flight.

        Raises:
          RunError: an update that landed was not finite and not skipped, or too many in a row were skipped.
        """
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._flying) > most:
            step, metrics = self._flying.popleft()
            jax.block_until_ready(metrics)
            self._landed()
            for name in FINITE:
                value = float(metrics[name])
                if not math.isfinite(value):
                    self._not_finite(step, f"{name} is {value} at step {step}", metrics)
                    break

    def _not_finite(self, step: int, what: str, metrics: dict[str, jax.Array]) -> None:
        advice = "lower optimizer.base_learning_rate or set optimizer.clip_norm, and use another --workdir"
        if "skipped" not in metrics:
            raise RunError(f"{what}; stopped before any checkpoint holds that update: {advice}")
        row = int(metrics["skipped_in_a_row"])
        if row >= self._max_nonfinite:
            raise RunError(
                f"{what}; stopped because {row} updates in a row were not finite (max_nonfinite "
                f"{self._max_nonfinite}): {advice}"
            )
        say(f"{what}: this update is skipped, {row} in a row, {int(metrics['skipped'])} in total")
