"""Metrics of multi-label classification and of regression, in float64 on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from cnx2_jax.evaluation.metrics import Records, mean_of_numbers
from cnx2_jax.evaluation.report import Report, Table, shown
from cnx2_jax.types import Metrics


class MultiLabelScores(Records):
    """Average precision and F1 from the scores `logit` and `target`, `[B, classes]` each, of all samples."""

    def __init__(self) -> None:
        super().__init__("logit", "target")

    def result(self, total: dict[str, np.ndarray]) -> Metrics:
        """Returns `map`, the average precision, and `f1`, both averaged over classes that have a positive.

        `threshold` is the probability, one for all classes, that makes `f1` largest on these very samples.
        """
        logits, targets = rows_of(total)
        threshold = best_threshold(logits, targets)
        present = np.flatnonzero(targets.any(axis=0))
        found = f1(probabilities(logits) >= threshold, targets)
        return {
            "map": mean_of_numbers(average_precision(logits, targets)[present]),
            "f1": mean_of_numbers(found[present]),
            "threshold": threshold,
        }

    def per_class(self, total: dict[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
        """Returns columns `[classes]`: `average_precision`, `f1`, `precision`, `recall` and `support`.

        The support is the number of positives. The others are NaN where a class has none, and the precision
        also where nothing is predicted.

        Args:
          total: merged.
          threshold: the probability from which on a class is predicted.
        """
        logits, targets = rows_of(total)
        predicted = probabilities(logits) >= threshold
        present = targets.any(axis=0)
        hits = (predicted & targets).sum(axis=0)
        with np.errstate(invalid="ignore"):
            return {
                "average_precision": average_precision(logits, targets),
                "f1": np.where(present, f1(predicted, targets), np.nan),
                "precision": np.where(present, hits / predicted.sum(axis=0), np.nan),
                "recall": hits / targets.sum(axis=0),
                "support": targets.sum(axis=0),
            }


def rows_of(total: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits, float64, and targets, bool; a logit that is NaN ranks last."""
    logits = total["logit"].astype(np.float64)
    return np.where(np.isnan(logits), -np.inf, logits), total["target"] > 0.5


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the logistic function of float64 logits."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def average_precision(
    scores: Float[np.ndarray, "n classes"], targets: Bool[np.ndarray, "n classes"]
) -> Float[np.ndarray, " classes"]:
    """Returns the average precision of each class: the precision at each score, weighted by gains in recall.

    Samples of equal score count together, as in scikit-learn's `average_precision_score`. NaN for a class
    without a positive.
    """
    found = np.full(scores.shape[1], np.nan)
    for place in np.flatnonzero(targets.any(axis=0)):
        order = np.argsort(-scores[:, place], kind="stable")
        ranked, hits = scores[order, place], np.cumsum(targets[order, place])
        last = np.append(ranked[1:] != ranked[:-1], True)  # of each score
        gains = np.diff(hits[last], prepend=0) / hits[-1]
        found[place] = np.sum(gains * hits[last] / (np.flatnonzero(last) + 1))
    return found


def f1(
    predicted: Bool[np.ndarray, "n classes"], targets: Bool[np.ndarray, "n classes"]
) -> Float[np.ndarray, " classes"]:
    """Returns the F1 of each class; 0 for one without positives and predictions."""
    hits = (predicted & targets).sum(axis=0)
    count = predicted.sum(axis=0) + targets.sum(axis=0)
    return 2 * hits / np.maximum(count, 1)


def best_threshold(logits: Float[np.ndarray, "n classes"], targets: Bool[np.ndarray, "n classes"]) -> float:
    """Returns the probability from which on classes are predicted that makes F1 largest.

    F1 is averaged over the classes that have a positive. The threshold lies midway between two scores, so
    rounding elsewhere does not move a sample across it. Of equally good ones it is the highest; 0.5 if no
    class has a positive.
    """
    present = targets.any(axis=0)
    if not present.any():
        return 0.5
    scores, targets = probabilities(logits[:, present]), targets[:, present]
    # How F1 of its class changes at each score, from the highest on: all classes are summed along one axis.
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.cumsum(np.take_along_axis(targets, order, axis=0), axis=0)
    counts = np.arange(1, len(scores) + 1)[:, None] + targets.sum(axis=0)
    changes = np.diff(2 * hits / counts, axis=0, prepend=0)
    ranked = np.take_along_axis(scores, order, axis=0).ravel()
    together = np.argsort(-ranked, kind="stable")
    ranked, sums = ranked[together], np.cumsum(changes.ravel()[together])
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    best = int(np.argmax(np.round(sums[last], 12)))  # rounded, as sums in another order differ by less
    upper = ranked[last[best]]
    lower = ranked[last[best + 1]] if best + 1 < len(last) else 0.0
    return float((upper + lower) / 2)


def regression_report(
    predicted: Float[np.ndarray, "n targets"], target: Float[np.ndarray, "n targets"], names: Sequence[str]
) -> Report:
    """Returns a table `targets` of the errors, and plots `scatter` and `residuals` of every target."""
    columns = regression_errors(predicted, target)
    rows = [(name, *map(shown, values)) for name, *values in zip(names, *columns.values(), strict=True)]

    def panels(figure, draw) -> None:
        figure.set_size_inches(4, 3.5 * len(names))
        for place, name in enumerate(names):
            axes = figure.add_subplot(len(names), 1, place + 1)
            axes.set_title(name, fontsize=9)
            draw(axes, target[:, place], predicted[:, place])

    def scatter(axes, truth: np.ndarray, found: np.ndarray) -> None:
        ends = min(truth.min(), found.min()), max(truth.max(), found.max())
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.scatter(truth, found, s=6, alpha=0.5)
        axes.set(xlabel="true", ylabel="predicted")

    def residuals(axes, truth: np.ndarray, found: np.ndarray) -> None:
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.scatter(found, found - truth, s=6, alpha=0.5)
        axes.set(xlabel="predicted", ylabel="predicted - true")

    return Report(
        {"targets": Table(("target", *columns), rows)},
        {
            "scatter": lambda figure: panels(figure, scatter),
            "residuals": lambda figure: panels(figure, residuals),
        },
    )


class RegressionErrors(Records):
    """Errors of predicted values from the scores `predicted` and `target`, `[B, targets]` each.

    Args:
      names: of the targets.
      mean, deviation: by which predictions were standardised; targets are in their own units.
    """

    def __init__(self, names: Sequence[str], mean: Sequence[float], deviation: Sequence[float]):
        super().__init__("predicted", "target")
        self.targets, self.mean, self.deviation = tuple(names), tuple(mean), tuple(deviation)

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.targets, self.mean, self.deviation))

    def result(self, total: dict[str, np.ndarray]) -> Metrics:
        """Returns `mae`, `rmse` and `r2`, averaged over the targets; of several also `mae_NAME` and so on.

        Errors are in the targets' own units.
        """
        predicted, target = self.values(total)
        columns = regression_errors(predicted, target)
        found = {name: float(values.mean()) for name, values in columns.items()}
        if len(self.targets) > 1:
            for place, target_name in enumerate(self.targets):
                found |= {f"{name}_{target_name}": float(values[place]) for name, values in columns.items()}
        return found

    def values(self, total: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns predictions and targets in their own units, float64 `[n, targets]` each."""
        predicted, target = (total[name].astype(np.float64) for name in self.names)
        return predicted * self.deviation + self.mean, target


def regression_errors(
    predicted: Float[np.ndarray, "n targets"], target: Float[np.ndarray, "n targets"]
) -> dict[str, Float[np.ndarray, " targets"]]:
    """Returns `mae`, `rmse` and `r2` of each target, as scikit-learn defines them.

    R2 of a target that is constant is 1 if all predictions are exact, else 0; of a single sample it is NaN.
    """
    errors = predicted - target
    squared = (errors**2).sum(axis=0)
    spread = ((target - target.mean(axis=0)) ** 2).sum(axis=0)
    r2 = 1 - squared / np.where(spread > 0, spread, 1)
    r2 = np.where(spread > 0, r2, np.where(squared > 0, 0.0, 1.0))
    return {
        "mae": np.abs(errors).mean(axis=0),
        "rmse": np.sqrt(squared / len(errors)),
        "r2": r2 if len(errors) > 1 else np.full_like(r2, np.nan),
    }
