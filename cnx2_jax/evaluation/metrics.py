"""Means over padded batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnx2_jax.models.state import merge, split
from cnx2_jax.types import Batch, Metrics

Score = Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]


def average(score: Score, model: nnx.Module, batches: Iterable[Batch]) -> Metrics:
    """Averages each sample's scores over all samples that are not padding.

    Args:
      score: (model, batch, positions `[B]` of the samples in the pass) -> arrays `[B]` by name.
      model: the model to score.
      batches: batches with a boolean `mask` `[B]`, False on padding.

    Returns:
      Mean by name. Sums over batches are kept in Python floats, so counts such as accuracy's are exact.
      Where batches say which images are `unreadable`, their share by that name: the means leave them out.
    """
    graph, params = split(model)
    totals: dict[str, float] = {}
    count = seen = 0
    unreadable: int | None = None
    for batch in batches:
        sums, valid, skipped = _sums(score, graph, params, batch, seen)
        seen += batch["mask"].shape[0]
        if "unreadable" in batch:
            unreadable = (unreadable or 0) + int(skipped)
        count += int(valid)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    metrics = {name: total / count for name, total in totals.items()}
    if unreadable is not None:
        metrics["unreadable"] = unreadable / (count + unreadable)
    return metrics


@partial(jax.jit, static_argnames=("score", "graph"))
def _sums(score: Score, graph: nnx.GraphDef, params, batch: Batch, seen: int):
    mask = batch["mask"]
    scores = score(merge(graph, params), batch, seen + jnp.arange(mask.shape[0]))
    sums = {n: jnp.where(mask, value, 0).sum() for n, value in scores.items()}
    return sums, mask.sum(), batch.get("unreadable", jnp.zeros(0)).sum()
