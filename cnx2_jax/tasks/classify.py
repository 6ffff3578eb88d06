"""Classification: fine-tuning, training from scratch, evaluation."""

import os
from collections.abc import Iterable, Mapping
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.imagenet import describe
from cnx2_jax.data.mixing import draw_mix, mix_images, mix_targets
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation import classification, metrics
from cnx2_jax.evaluation.metrics import Collected
from cnx2_jax.evaluation.outcomes import Outcomes, Reporter, outcome_report, worst_mistakes
from cnx2_jax.evaluation.report import Report
from cnx2_jax.files import to_path
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import Params
from cnx2_jax.observe.grid import draw_sheet
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Described, Task
from cnx2_jax.train.terms import Term, Terms, mean_of
from cnx2_jax.types import Batch, HostBatch, Metrics

S = TypeVar("S", bound=classification.Scorer)

CLASS_WEIGHTS = ("none", "balanced")
MISTAKES, MISTAKES_PER_ROW = 24, 6  # images that a report shows


class Classify(Task, name="classify"):
    """A classifier on the images of a config, from scratch or from `config.init_from`.

    Evaluation gives `accuracy`, `top5_accuracy` (shares, not percent) and `loss` (cross-entropy).

    Raises:
      UserError: the images have fewer than two classes; see `Task` and `weights.starting_params`.
    """

    best = ("accuracy", "max")
    gives_report = True
    gives_heatmaps = True
    prepare_normalises = True
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
        config.model.head_init_scale = 1.0  # factor on the initial weights of the head
        config.label_smoothing = 0.0  # the share of the target that is spread over all classes
        # With both mixup and cutmix, each batch draws which.
        config.mixup = 0.0  # alpha of the beta distribution of blending coefficients; 0: none
        config.cutmix = 0.0  # alpha of the beta distribution of pasted boxes' areas; 0: none
        config.class_weights = "none"  # or balanced: every class has the same weight in the loss
        config.eval_flip = False  # average probabilities with the mirrored image
        config.data.labels = ""  # a CSV file with the class of each image in data.root; empty: sub-folders
        config.data.classes = ""  # a text file with one class name per line; empty: those in data.labels
        config.data.sampling = "all"  # or balanced: images of every class equally often

    def check(self) -> None:
        super().check()
        chosen = self.config.get("class_weights", "none")
        if chosen not in CLASS_WEIGHTS:
            hint = nearest(chosen, CLASS_WEIGHTS)
            raise UserError(f"unknown class_weights '{chosen}'{hint} (known: {', '.join(CLASS_WEIGHTS)})")
        if self.config.data.classes and not self.config.data.labels:
            raise UserError(
                f"data.classes '{self.config.data.classes}' names the classes in data.labels; set that "
                "too, or leave it out"
            )

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
        return weights.starting_params(to_path(self.config.init_from), self.config, arrays, self.class_names)

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
        correct = logits.argmax(axis=-1) == batch["label"]
        targets = batch["target"]
        if self.config.class_weights == "none":
            loss = mean_of(optax.softmax_cross_entropy(logits, targets))
        else:
            weighted = targets * jnp.asarray(self.class_weights(), jnp.float32)
            loss = Term(-(weighted * jax.nn.log_softmax(logits)).sum(), weighted.sum())
        return {"loss": loss}, {"accuracy": mean_of(correct)}

    def class_weights(self) -> Float[np.ndarray, " classes"]:
        """Returns the weight of each class: images over classes times its images, as in scikit-learn.

        A class without training images has the weight 0.
        """
        if isinstance(self.data, Described):
            return np.ones(len(self.class_names))
        counts = np.bincount(self.data.train.all_labels(), minlength=len(self.class_names))
        return np.where(counts > 0, counts.sum() / (len(counts) * np.maximum(counts, 1)), 0)

    def score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        return self._scorer(classification.Scorer).score(model, batch, positions)

    def _scorer(self, kind: type[S]) -> S:
        """Returns a scorer of this class for the task's images."""
        data = self.config.data
        return kind(tuple(data.mean), tuple(data.std), bool(self.config.get("eval_flip", False)))

    def reporter(self) -> Reporter:
        return self._scorer(Reporter)

    def report(self, collected: Collected) -> Report:
        """Returns the tables and plots of `outcome_report`, and a picture `mistakes` of the worst ones."""
        total = collected.total(Outcomes)
        report = outcome_report(total, self.class_names)
        rows = worst_mistakes(total, MISTAKES)
        if not len(rows):
            return report
        captions = [
            f"{sure:.0%} {self.class_names[found]}, is {self.class_names[label]}"
            for sure, found, label in zip(
                *(total[name][rows] for name in ("confidence", "predicted", "label")), strict=True
            )
        ]
        images = self.drawable(self.images.val_images(total["position"][rows]))
        return report._replace(pictures={"mistakes": draw_sheet(images, captions, MISTAKES_PER_ROW)})

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
        return metrics.evaluate(self._scorer(classification.Scorer), model, batches)


def _shown(name: str) -> str:
    name = os.fsencode(name).decode(errors="replace")  # a name that is not valid text cannot be printed
    return name if name == describe(name) else f"{name} {describe(name)}"
