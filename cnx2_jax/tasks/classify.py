"""Classification: fine-tuning, training from scratch, evaluation."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.mixing import draw_mix, mix_images, mix_targets
from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.tasks import base
from cnx2_jax.train.evaluation import average
from cnx2_jax.train.state import Params
from cnx2_jax.train.task import Batch, Data, Metrics


class Classify:
    """A classifier on the images of a config, from scratch or from `config.init_from`.

    Evaluation gives `accuracy`, `top5_accuracy` (shares, not percent) and `loss` (cross-entropy).
    `platform` is what the model is built for; see `base.build`.

    Raises:
      UserError: the images have fewer than two classes; see `base.check` and `base.starting_params`.
    """

    best: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(self, config: ConfigDict, platform: str | None = None):
        base.check(config)
        self.config = config
        self._platform = platform
        self.images = base.open_images(config)
        self.data: Data = self.images
        self.class_names = self.images.class_names
        if len(self.class_names) < 2:
            raise UserError(
                f"classification needs at least two classes, '{config.data.root}' has "
                f"{len(self.class_names)}; put each class's images into a sub-folder of its own"
            )

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        return base.build(self.config, len(self.class_names), rngs, self._platform)

    def start(self, params: Params) -> Params:
        if not self.config.init_from:
            return params
        return base.starting_params(Path(self.config.init_from), self.config, params, self.class_names)

    def begin(self, params: Params) -> None:
        pass  # no batch depends on them

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes the images, as `mixup` and `cutmix` say, and makes targets of their labels."""
        config = self.config
        images = base.normalise(batch["image"], config.data)
        mix = draw_mix(key, image_hw(config), config.mixup, config.cutmix)
        if config.mixup or config.cutmix:
            images = mix_images(images, mix)
        targets = mix_targets(batch["label"], len(self.class_names), mix, config.label_smoothing)
        return {**batch, "image": images, "target": targets}

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array):
        logits = model(batch["image"], keys)
        loss = optax.softmax_cross_entropy(logits, batch["target"]).mean()
        correct = logits.argmax(axis=-1) == batch["label"]
        return loss, {"accuracy": correct.mean()}

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        return evaluate(model, self.config, batches)

    def pictures(self, model: ConvNeXtV2) -> dict[str, np.ndarray]:
        return {}

    def card(self) -> dict:
        return base.make_card(self.config, self.class_names)


def evaluate(model: nnx.Module, config: ConfigDict, batches: Iterable[Batch]) -> Metrics:
    """Returns `accuracy`, `top5_accuracy` and `loss` over one pass of padded batches.

    Args:
      model: maps normalised images `[B, H, W, C]` to logits.
      config: of its run, for the normalisation.
      batches: as `data.pipeline.eval_batches` gives them.
    """
    return average(_Score(tuple(config.data.mean), tuple(config.data.std)), model, batches)


@dataclasses.dataclass(frozen=True)
class _Score:
    """Each sample's scores; equal ones compile once."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, model, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        del positions  # nothing is drawn
        return class_scores(model(base.normalise(batch["image"], self)), batch["label"])


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
