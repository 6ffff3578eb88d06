"""Early stopping: a run ends when its best metric has not improved for a number of evaluations."""

import math
from collections.abc import Sequence
from typing import Literal

from cnx2_jax.types import Metrics


class EarlyStopping:
    """Decides by the recorded evaluations of a run alone, so a resumed run decides as an undisturbed one.

    Args:
      metric: its name.
      end: whether its maximum or minimum is best.
      patience: evaluations in a row without a better one after which the run ends; 0: never.
    """

    def __init__(self, metric: str, end: Literal["max", "min"], patience: int):
        self._metric = metric
        self._sign = 1 if end == "max" else -1
        self._patience = patience

    def reached(self, evaluations: Sequence[Metrics]) -> bool:
        """Returns whether the run ends after these evaluations: all of it, in their order."""
        return 0 < self._patience <= len(evaluations) - 1 - self._best(evaluations)

    def reason(self, evaluations: Sequence[Metrics], images: int, batch: int) -> str:
        """Returns a line about why the run ended.

        Args:
          evaluations: all of the run, each with its `step`.
          images: training images per epoch.
          batch: images per step.
        """
        best = evaluations[self._best(evaluations)]
        epoch = best["step"] * batch / images
        return (
            f"stopped early: {self._metric} has not improved on {best[self._metric]:.4g} (epoch {epoch:.4g}) "
            f"for {self._patience} evaluations"
        )

    def _best(self, evaluations: Sequence[Metrics]) -> int:
        """Returns the position of the best evaluation: the first of equal ones, which others do not beat."""
        scores = [self._score(evaluation) for evaluation in evaluations]
        return scores.index(max(scores)) if scores else -1

    def _score(self, evaluation: Metrics) -> float:
        value = self._sign * evaluation[self._metric]
        return -math.inf if math.isnan(value) else value
