"""Classification: fine-tuning, training from scratch, evaluation."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.imagenet import describe
from cnx2_jax.data.mixing import draw_mix, mix_images, mix_targets
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import classification
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import Params
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Task
from cnx2_jax.train.terms import Terms, mean_of
from cnx2_jax.types import Batch, HostBatch, Metrics


class Classify(Task, name="classify"):
    """A classifier on the images of a config, from scratch or from `config.init_from`.

    Evaluation gives `accuracy`, `top5_accuracy` (shares, not percent) and `loss` (cross-entropy).

    Raises:
      UserError: the images have fewer than two classes; see `Task` and `weights.starting_params`.
    """

    best = ("accuracy", "max")
    ranges: ClassVar = {
        "model.head_init_scale": (0, 1e9),
        "label_smoothing": (0, 0.999),
        "mixup": (0, 1e6),
        "cutmix": (0, 1e6),
    }

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.init_from = ""  # a checkpoint to start from; empty: from scratch
        config.init_bands = ""  # how its stem fits images of other bands: mean, tile, map:R,G,B or fresh
        config.model.head_init_scale = 1.0
        config.label_smoothing = 0.0
        # Alphas of the beta distributions that mixing coefficients are drawn from; 0: none. With both, each
        # batch draws which.
        config.mixup = 0.0
        config.cutmix = 0.0

    def check_data(self) -> None:
        if len(self.class_names) < 2:
            raise UserError(
                f"classification needs at least two classes, '{self.config.data.root}' has "
                f"{len(self.class_names)}; put each class's images into a sub-folder of its own"
            )

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        return models.build(self.config, len(self.class_names), rngs, self.platform)

    def start(self, arrays: Params) -> Params:
        if not self.config.init_from:
            return arrays
        return weights.starting_params(Path(self.config.init_from), self.config, arrays, self.class_names)

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes the images by `mixup` and `cutmix`, and makes targets of their labels."""
        config = self.config
        images = self.normalise(batch["image"])
        mix = draw_mix(key, image_hw(config), config.mixup, config.cutmix)
        if config.mixup or config.cutmix:
            images = mix_images(images, mix)
        targets = mix_targets(batch["label"], len(self.class_names), mix, config.label_smoothing)
        return {**batch, "image": images, "target": targets}

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        logits = model(batch["image"], keys)
        loss = optax.softmax_cross_entropy(logits, batch["target"])
        correct = logits.argmax(axis=-1) == batch["label"]
        return {"loss": mean_of(loss)}, {"accuracy": mean_of(correct)}

    def score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        return classification.class_scores(model(self.normalise(batch["image"])), batch["label"])

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        shares = outputs["probability"]
        best = [(self.class_names[place], float(shares[place])) for place in shares.argsort()[::-1][:top]]
        return {
            "predictions": [
                {"class": name, "name": describe(name), "probability": share} for name, share in best
            ]
        }

    def prediction_lines(self, prediction: dict) -> list[str]:
        width = max(map(len, map(_shown, self.class_names)))
        return [
            f"  {_shown(each['class']):<{width}}  {each['probability']:6.2%}"
            for each in prediction["predictions"]
        ]

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Names one class, or the two that were mixed with their shares."""
        pictures, captions = super().sheet(batch, prepared)
        if "target" in prepared:
            captions = [self._caption(target) for target in np.asarray(prepared["target"])]
        return pictures, captions

    def _caption(self, target: np.ndarray) -> str:
        smoothing = self.config.label_smoothing
        shares = (target - smoothing / len(target)) / (1 - smoothing)
        first, second = np.argsort(-shares, kind="stable")[:2]
        if shares[second] < 0.005:
            return self.class_names[first]
        names = self.class_names
        return f"{names[first]} {shares[first]:.0%}, {names[second]} {shares[second]:.0%}"

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        # The same as by `score`, but compiled once for all tasks that normalise alike.
        return classification.evaluate(model, self.config.data.mean, self.config.data.std, batches)


def _shown(name: str) -> str:
    name = os.fsencode(name).decode(errors="replace")  # a name that is not valid text cannot be printed
    return name if name == describe(name) else f"{name} {describe(name)}"
