"""Accuracy of a classifier."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from cnx2_jax.evaluation import metrics
from cnx2_jax.evaluation.outputs import ONE_CLASS
from cnx2_jax.models.pixels import normalise
from cnx2_jax.types import Batch, Metrics


def evaluate(
    model: nnx.Module,
    mean: Sequence[float],
    std: Sequence[float],
    batches: Iterable[Batch],
) -> Metrics:
    """Returns `accuracy`, `top5_accuracy` and `loss` over one pass of padded batches.

    Args:
      model: maps normalised images `[B, H, W, C]` to logits.
      mean, std: that normalise the images.
      batches: as `data.images.eval_batches` gives them.
    """
    return metrics.evaluate(Scorer(tuple(mean), tuple(std)), model, batches)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores each sample; equal ones compile once.

    Attributes:
      mean, std: that normalise the images.
      flip: whether probabilities are averaged over each image and its mirror image.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = False

    def logits(self, model, batch: Batch) -> Float[Array, "b classes"]:
        """Returns the logits of a batch's images."""
        return ONE_CLASS.of(model, normalise(batch["image"], self.mean, self.std), flip=self.flip)

    def score(self, model, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        return class_scores(self.logits(model, batch), batch["label"])

    def metrics(self) -> tuple[metrics.Metric, ...]:
        return (metrics.Mean(),)


def class_scores(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> dict[str, jax.Array]:
    """Returns `accuracy`, `top5_accuracy` and `loss` of every sample, `[B]` each."""
    # The label's rank is the number of classes above it; ties go to the lower index, as in argmax.
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Counted as those it does not beat, so that a NaN is never right.
    later = jnp.arange(logits.shape[1]) >= labels[:, None]
    rank = (~((logits < label_logit) | ((logits == label_logit) & later))).sum(axis=1)
    return {
        "accuracy": rank < 1,
        "top5_accuracy": rank < 5,
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    }
