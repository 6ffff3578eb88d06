"""Classification: fine-tuning, training from scratch, evaluation, prediction."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.tasks import base
from cnx2_jax.train.evaluation import average
from cnx2_jax.train.state import Params, merge, split
from cnx2_jax.train.task import Batch, Metrics


class Classify:
    """A classifier on the images of a config, from scratch or from `config.init_from`.

    Evaluation gives `accuracy`, `top5_accuracy` (shares, not percent) and `loss` (cross-entropy).

    Raises:
      UserError: the images have fewer than two classes; see `base.check` and `base.starting_params`.
    """

    best: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(self, config: ConfigDict):
        base.check(config)
        if not 0 <= config.label_smoothing < 1:
            raise UserError(f"label_smoothing {config.label_smoothing} must be at least 0 and below 1")
        self.config = config
        self.data = base.open_images(config)
        self.class_names = self.data.class_names
        if len(self.class_names) < 2:
            raise UserError(
                f"classification needs at least two classes, '{config.data.root}' has "
                f"{len(self.class_names)}; put each class's images into a sub-folder of its own"
            )

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        return base.build(self.config, len(self.class_names), rngs)

    def start(self, params: Params) -> Params:
        if not self.config.init_from:
            return params
        return base.starting_params(Path(self.config.init_from), self.config, params)

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array):
        logits = model(base.normalise(batch["image"], self.config.data), keys)
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        targets = optax.smooth_labels(targets, self.config.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        correct = logits.argmax(axis=-1) == batch["label"]
        return loss, {"accuracy": correct.mean()}

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        return average(self._score, model, batches)

    def _score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        del positions  # nothing is drawn
        logits, labels = model(base.normalise(batch["image"], self.config.data)), batch["label"]
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

    def pictures(self, model: ConvNeXtV2) -> dict[str, np.ndarray]:
        return {}

    def card(self) -> dict:
        return base.make_card(self.config, self.class_names)


def probabilities(model: ConvNeXtV2, config: ConfigDict, images: np.ndarray) -> np.ndarray:
    """Returns class probabilities `[N, classes]` in float32 of uint8 images `[N, H, W, C]`."""
    graph, params = split(model)
    return np.asarray(_probabilities(graph, params, base.normalise(jnp.asarray(images), config.data)))


@partial(jax.jit, static_argnames="graph")
def _probabilities(graph: nnx.GraphDef, params: Params, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(merge(graph, params)(images), axis=-1)
