"""Classification: fine-tuning, training from scratch, evaluation."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.checkpoints.metadata import make_card
from cnx2_jax.configuration import image_hw
from cnx2_jax.data.mixing import draw_mix, mix_images, mix_targets
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import classification
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import Params
from cnx2_jax.tasks import base, models, weights
from cnx2_jax.train.task import Data
from cnx2_jax.types import Batch, Metrics


class Classify:
    """A classifier on the images of a config, from scratch or from `config.init_from`.

    Evaluation gives `accuracy`, `top5_accuracy` (shares, not percent) and `loss` (cross-entropy).
    `platform` is what the model is built for; see `models.build`.

    Raises:
      UserError: the images have fewer than two classes; see `base.check` and `weights.starting_params`.
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
        return models.build(self.config, len(self.class_names), rngs, self._platform)

    def start(self, params: Params) -> Params:
        if not self.config.init_from:
            return params
        return weights.starting_params(Path(self.config.init_from), self.config, params, self.class_names)

    def begin(self, params: Params) -> None:
        pass  # no batch depends on them

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes the images, as `mixup` and `cutmix` say, and makes targets of their labels."""
        config = self.config
        images = normalise(batch["image"], config.data.mean, config.data.std)
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
        return classification.evaluate(model, self.config.data.mean, self.config.data.std, batches)

    def pictures(self, model: ConvNeXtV2) -> dict[str, np.ndarray]:
        return {}

    def card(self) -> dict:
        return make_card(self.config, self.class_names)
