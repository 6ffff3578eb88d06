"""How right and how sure a classifier is: per-class scores, calibration, confusions, worst mistakes."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from cnx2_jax.evaluation.classification import Scorer, class_scores
from cnx2_jax.evaluation.metrics import Mean, Metric, Records
from cnx2_jax.evaluation.report import Report, Table, class_report, shown
from cnx2_jax.types import Batch, Metrics

BINS = 15  # of the confidence, as in Guo et al., arXiv 1706.04599
NAMED_CLASSES = 60  # up to so many, the confusion matrix names them
INCH_PER_NAME = 0.2
MOST_CLASSES = 1000  # of more classes it is not drawn
MOST_CONFUSIONS = 50  # rows of their table


class Outcomes(Records):
    """The label, the predicted class and its probability, and the place in the pass, of every sample."""

    def __init__(self) -> None:
        super().__init__("label", "predicted", "confidence", "position")

    def result(self, total: dict[str, np.ndarray]) -> Metrics:
        """Returns `ece`, the expected calibration error, and `mce`, the largest of any bin."""
        errors = calibration(total["confidence"].astype(np.float64), total["label"] == total["predicted"])
        return {"ece": errors.expected, "mce": errors.largest}


@dataclasses.dataclass(frozen=True)
class Reporter(Scorer):
    """Scores a classifier's samples for a report; equal ones compile once."""

    def score(self, model, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        logits = self.logits(model, batch)
        return {
            **class_scores(logits, batch["label"]),
            "label": batch["label"],
            "predicted": logits.argmax(axis=-1),
            "confidence": jax.nn.softmax(logits).max(axis=-1),
            "position": positions,
        }

    def metrics(self) -> tuple[Metric, ...]:
        return Mean("accuracy", "top5_accuracy", "loss"), Outcomes()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Confidence compared with accuracy in bins of equal width, those that hold samples alone.

    Attributes:
      confidence, accuracy: means `[bins]`.
      counts: samples `[bins]`.
      expected: the difference of both, averaged over samples; NaN without any.
      largest: the largest difference.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    expected: float
    largest: float


def calibration(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = BINS
) -> Calibration:
    """Returns the calibration; bin k of n holds confidences above k / n and up to (k + 1) / n.

    Args:
      confidence: the probability of each predicted class, 0 to 1; not a number counts as 0.
      correct: whether it is the sample's.
      bins: how many.
    """
    confidence = np.nan_to_num(confidence)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    present = counts > 0
    counts = counts[present]
    sums = (np.bincount(place, each, minlength=bins)[present] for each in (confidence, correct))
    sure, right = (each / counts for each in sums)
    apart = np.abs(sure - right)
    if not len(counts):
        return Calibration(sure, right, counts, float("nan"), float("nan"))
    return Calibration(sure, right, counts, float((apart * counts).sum() / counts.sum()), float(apart.max()))


def per_class(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int
) -> dict[str, np.ndarray]:
    """Returns columns `[classes]`: `f1`, `precision`, `recall` and `support`, the number of samples.

    The precision is NaN for a class that is never predicted, the recall and F1 for one that has no samples.
    """
    support, found = (np.bincount(each, minlength=classes) for each in (labels, predicted))
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    with np.errstate(invalid="ignore"):
        return {
            "f1": np.where(support > 0, 2 * hits / np.maximum(support + found, 1), np.nan),
            "precision": hits / found,
            "recall": hits / support,
            "support": support,
        }


def worst_mistakes(total: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Returns the rows of the wrong predictions of highest confidence, the worst first, at most `count`."""
    wrong = np.flatnonzero(total["label"] != total["predicted"])
    return wrong[np.argsort(-total["confidence"][wrong], kind="stable")][:count]


def outcome_report(total: dict[str, np.ndarray], class_names: Sequence[str]) -> Report:
    """Returns the report of a classifier, without pictures of images.

    Tables `classes`, `calibration`, `confusions` (the most frequent ones) and plots `classes`, `calibration`
    and, of up to 1,000 classes, `confusion`: the share of each class's samples that is taken for each class.
    """
    labels, predicted = total["label"], total["predicted"]
    classes = len(class_names)
    report = class_report(class_names, per_class(labels, predicted, classes))
    bins = calibration(total["confidence"].astype(np.float64), labels == predicted)
    rows = [
        (shown(c), shown(a), shown(n))
        for c, a, n in zip(bins.confidence, bins.accuracy, bins.counts, strict=True)
    ]

    def draw_calibration(figure) -> None:
        figure.set_size_inches(4, 4)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.plot(bins.confidence, bins.accuracy, marker="o")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.set_title(
            f"expected calibration error {bins.expected:.4f}, largest {bins.largest:.4f}", fontsize=8
        )

    def draw_confusion(figure) -> None:
        counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        named = classes <= NAMED_CLASSES
        side = 2 + INCH_PER_NAME * classes if named else 8
        figure.set_size_inches(side, side)
        axes = figure.add_subplot()
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set(xlabel="predicted", ylabel="true")
        if named:
            axes.set_xticks(range(classes), class_names, fontsize=7, rotation=90)
            axes.set_yticks(range(classes), class_names, fontsize=7)

    plots = {**report.plots, "calibration": draw_calibration}
    if classes <= MOST_CLASSES:
        plots["confusion"] = draw_confusion
    tables = {
        **report.tables,
        "calibration": Table(("confidence", "accuracy", "samples"), rows),
        "confusions": Table(("true", "predicted", "samples"), _confusions(labels, predicted, class_names)),
    }
    return Report(tables, plots)


def _confusions(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> list[tuple[str, str, int]]:
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    return [(names[pairs[0, place]], names[pairs[1, place]], int(counts[place])) for place in order]
