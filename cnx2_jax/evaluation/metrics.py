"""Metrics over a pass of padded batches: empty -> update -> add -> merge -> result.

What a batch contributes is computed on the devices, over the global batch; contributions are added on the
host, in 64 bits, so that counts stay exact however many there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from cnx2_jax.cluster.agree import gathered
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.types import HOST, Batch, Metrics

Scores = Mapping[str, jax.Array]


class Metric(Protocol):
    """One or several numbers from the scores of all samples; hashable, and equal ones compile once."""

    def empty(self) -> Any:
        """Returns the total of no batch."""
        ...

    def update(self, scores: Scores, valid: jax.Array) -> Any:
        """Returns what a global batch contributes. Traced; `valid`, bool `[B]`, is False on padding."""
        ...

    def add(self, total: Any, contribution: Any, host: Mapping[str, np.ndarray]) -> Any:
        """Returns the total with one more contribution, on the host.

        `host` holds the arrays of this process's share of the batch that never go to a device, such as ids.
        """
        ...

    def merge(self, total: Any) -> Any:
        """Returns the total over all processes; all of them must call it."""
        ...

    def result(self, total: Any) -> Metrics:
        """Returns the metrics by name."""
        ...


class Scorer(Protocol):
    """A task, or any hashable object with its two methods."""

    def score(self, model: Any, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        """See `tasks.base.Task.score`."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """See `tasks.base.Task.metrics`."""
        ...


class Mean:
    """The mean of scores `[B]` over all samples, by the score's name.

    Args:
      names: of the scores; by default every score that is one number per sample.
    """

    def __init__(self, *names: str):
        self.names = names

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.names == self.names

    def __hash__(self) -> int:
        return hash((type(self), self.names))

    def empty(self) -> tuple[dict[str, float], int]:
        return {}, 0

    def update(self, scores: Scores, valid: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        names = self.names or [name for name, score in scores.items() if score.ndim == 1]
        return {name: jnp.where(valid, scores[name], 0).sum() for name in names}, valid.sum()

    def add(self, total, contribution, host):
        (sums, count), (more, valid) = total, contribution
        return {name: sums.get(name, 0.0) + float(value) for name, value in more.items()}, count + int(valid)

    def merge(self, total):
        return total  # contributions are of global batches

    def result(self, total) -> Metrics:
        sums, count = total
        return {name: value / count for name, value in sums.items()}


class ConfusionMatrix:
    """Shares of pixels, or of samples, by true and predicted class.

    Scores: `target` and `predicted`, integers of one shape `[B, ...]`; what has a target outside of
    `0 .. num_classes - 1`, such as an ignore index, does not count.

    Args:
      num_classes: how many classes there are.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfusionMatrix) and other.num_classes == self.num_classes

    def __hash__(self) -> int:
        return hash((ConfusionMatrix, self.num_classes))

    def empty(self) -> np.ndarray:
        return np.zeros((self.num_classes, self.num_classes), np.int64)

    def update(self, scores: Scores, valid: jax.Array) -> jax.Array:
        """Returns counts, int32 `[true, predicted]`; a global batch has fewer than 2^31 pixels."""
        target, predicted = scores["target"], scores["predicted"]
        assert target.size < 2**31, target.shape
        counted = (target >= 0) & (target < self.num_classes)
        counted &= valid.reshape(-1, *[1] * (target.ndim - 1))
        cell = jnp.where(counted, target * self.num_classes + predicted, self.num_classes**2)
        counts = jnp.zeros(self.num_classes**2 + 1, jnp.int32).at[cell.ravel()].add(1)
        return counts[:-1].reshape(self.num_classes, self.num_classes)

    def add(self, total: np.ndarray, contribution: jax.Array, host) -> np.ndarray:
        return total + np.asarray(contribution)

    def merge(self, total: np.ndarray) -> np.ndarray:
        return total  # contributions are of global batches

    def result(self, total: np.ndarray) -> Metrics:
        """Returns `miou` and `mean_accuracy` over the classes that occur, and `pixel_accuracy`.

        The intersection over union is averaged over classes that are in the targets or the predictions, the
        accuracy over those in the targets (mmsegmentation's `nan` rule). NaN where there are none.
        """
        classes = self.per_class(total)
        with np.errstate(invalid="ignore"):
            overall = np.diag(total).sum() / total.sum()
        return {
            "miou": mean_of_numbers(classes["iou"]),
            "mean_accuracy": mean_of_numbers(classes["accuracy"]),
            "pixel_accuracy": float(overall),
        }

    def per_class(self, total: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `iou`, `accuracy` and `share` of every class, `[num_classes]` each; NaN where undefined.

        `share` is that of all counted pixels which belong to the class.
        """
        right, true, predicted = np.diag(total), total.sum(axis=1), total.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "iou": right / (true + predicted - right),
                "accuracy": right / true,
                "share": true / total.sum(),
            }


def mean_of_numbers(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


class Records:
    """Keeps scores of every sample, for metrics that need all of them at once; derive and give `result`.

    Args:
      names: of the scores to keep; in a batch each is an array `[B, ...]`, of the same shape in all batches.
      host: names of host-only fields to keep, such as an identifier: numbers, or bytes of one length at most.
    """

    def __init__(self, *names: str, host: tuple[str, ...] = ()):
        self.names, self.host = names, host

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and (other.names, other.host) == (self.names, self.host)

    def __hash__(self) -> int:
        return hash((type(self), self.names, self.host))

    def empty(self) -> list[dict[str, np.ndarray]]:
        return []

    def update(self, scores: Scores, valid: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        return {name: scores[name] for name in self.names}, valid

    def add(self, total, contribution, host):
        scores, valid = contribution
        keep = local_rows(valid)
        rows = {name: local_rows(score)[keep] for name, score in scores.items()}
        rows |= {name: np.asarray(host[name])[keep] for name in self.host}
        return [*total, rows]

    def merge(self, total) -> dict[str, np.ndarray]:
        """Returns the rows of all processes, one after another, each sample once."""
        joined = {name: np.concatenate([part[name] for part in total]) for name in self.names + self.host}
        return {name: _over_processes(rows) for name, rows in joined.items()}

    def result(self, total: dict[str, np.ndarray]) -> Metrics:
        """Returns the metrics of the rows `[samples, ...]` by name."""
        raise NotImplementedError


def local_rows(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of a global array that is sharded by rows or not at all."""
    if array.is_fully_replicated and jax.process_count() > 1:
        return np.split(np.asarray(array), jax.process_count())[jax.process_index()]
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _over_processes(rows: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, which may have different numbers of them."""
    if jax.process_count() == 1:
        return rows
    if rows.dtype.kind in "SO":  # texts have other lengths in other processes, and devices take none
        every = gathered([bytes(text).decode() for text in rows])
        return np.array([text.encode() for part in every for text in part], object)
    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = multihost_utils.process_allgather(padded)
    return np.concatenate([part[:count] for part, count in zip(every, counts, strict=True)])


class Collected(NamedTuple):
    """The totals of a pass, merged over all processes.

    Attributes:
      totals: of each metric, beside it.
      unreadable: the share of images that could not be read; None where batches do not mark them.
    """

    totals: list[tuple[Metric, Any]]
    unreadable: float | None

    def total(self, kind: type) -> Any:
        """Returns the total of the metric of this class."""
        return next(total for metric, total in self.totals if isinstance(metric, kind))

    def results(self) -> Metrics:
        """Returns the metrics by name."""
        results: Metrics = {}
        for metric, total in self.totals:
            results |= metric.result(total)
        if self.unreadable is not None:
            results["unreadable"] = self.unreadable
        return results


def evaluate(scorer: Scorer, model: nnx.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns the metrics of a model over one pass; see `collect`.

    Where batches mark images as `unreadable`, their share is among them; all other metrics leave them out.
    """
    return collect(scorer, model, batches).results()


def collect(scorer: Scorer, model: nnx.Module, batches: Iterable[Batch]) -> Collected:
    """Returns the totals of a model's metrics over one pass.

    Args:
      scorer: gives scores and metrics.
      model: the model to evaluate.
      batches: padded batches with a boolean `mask` `[B]`, False on padding; see `sharding.put_batches`.
    """
    graph, arrays = split(model)
    metrics = tuple(scorer.metrics())
    totals = [metric.empty() for metric in metrics]
    seen = count = 0
    unreadable: int | None = None
    for batch in batches:
        host: Any = batch.get(HOST, {})
        batch = {name: array for name, array in batch.items() if name != HOST}
        contributions, valid, skipped = _contributions(scorer, metrics, graph, arrays, batch, seen)
        seen += batch["mask"].shape[0]
        count += int(valid)
        if "unreadable" in batch:
            unreadable = (unreadable or 0) + int(skipped)
        totals = [
            metric.add(total, contribution, host)
            for metric, total, contribution in zip(metrics, totals, contributions, strict=True)
        ]
    merged = [(metric, metric.merge(total)) for metric, total in zip(metrics, totals, strict=True)]
    return Collected(merged, None if unreadable is None else unreadable / (count + unreadable))


@partial(jax.jit, static_argnames=("scorer", "metrics", "graph"))
def _contributions(
    scorer: Scorer,
    metrics: tuple[Metric, ...],
    graph: nnx.GraphDef,
    arrays: Params,
    batch: Batch,
    seen: int,
):
    valid = batch["mask"]
    scores = scorer.score(merge(graph, arrays), batch, seen + jnp.arange(valid.shape[0]))
    contributions = [metric.update(scores, valid) for metric in metrics]
    return contributions, valid.sum(), batch.get("unreadable", jnp.zeros(0)).sum()
