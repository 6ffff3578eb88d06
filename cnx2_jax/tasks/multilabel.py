"""Multi-label classification: any number of classes per image."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from ml_collections import ConfigDict

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.mixing import draw_mix, mix_images, mix_rows
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation.labels import MultiLabelScores
from cnx2_jax.evaluation.metrics import Collected, Mean, Metric
from cnx2_jax.evaluation.outputs import ANY_CLASSES
from cnx2_jax.evaluation.report import Report, class_report
from cnx2_jax.files import to_path
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import Params
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Described, Task
from cnx2_jax.train.terms import Terms, mean_of
from cnx2_jax.types import Batch, HostBatch, Metrics

POSITIVE_WEIGHTS = ("none", "balanced")
MOST_WEIGHT = 20.0  # of a positive; without a bound, a class of few images would decide the loss
THRESHOLD = 0.5  # of a probability, until an evaluation has chosen one


class Multilabel(Task, name="multilabel"):
    """A classifier with a probability of its own for each class, from scratch or from `config.init_from`.

    Evaluation gives `map`, `f1` and `threshold` (see `MultiLabelScores`), and `loss`, the cross-entropy
    averaged over classes, without weights and smoothing. The threshold of the last evaluation, with averaged
    weights if the run has them, is part of the checkpoint, and `predict` names the classes that reach it.

    Raises:
      UserError: an unknown `positive_weights`; no class, or no label among the validation images; see `Task`
        and `weights.starting_params`.
    """

    best = ("map", "max")
    gives_report = True
    gives_heatmaps = True
    prepare_normalises = True
    wanted = "labels"
    outputs = ANY_CLASSES
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
        config.label_smoothing = 0.0  # moves the targets 0 and 1 by half of this towards each other
        # With both mixup and cutmix, each batch draws which.
        config.mixup = 0.0  # alpha of the beta distribution of blending coefficients; 0: none
        config.cutmix = 0.0  # alpha of the beta distribution of pasted boxes' areas; 0: none
        config.positive_weights = "none"  # or balanced: a class's negatives per positive, at most 20
        config.eval_flip = False  # average probabilities with the mirrored image
        config.data.labels = ""  # a CSV file of the classes of each image in data.root
        config.data.classes = ""  # a text file with one class name per line; empty: those in data.labels

    def __init__(self, config: ConfigDict, platform: str | None = None, data: Any = None):
        super().__init__(config, platform, data)
        self.threshold = THRESHOLD

    def check(self) -> None:
        super().check()
        chosen = self.config.positive_weights
        if chosen not in POSITIVE_WEIGHTS:
            hint = nearest(chosen, POSITIVE_WEIGHTS)
            raise UserError(
                f"unknown positive_weights '{chosen}'{hint} (known: {', '.join(POSITIVE_WEIGHTS)})"
            )

    def check_data(self) -> None:
        if not self.data.val.targets["labels"].any():
            raise UserError(
                f"none of the {self.data.num_val} validation images has a label, so there is nothing to "
                "evaluate; give data.labels a column 'split', or raise data.val_fraction"
            )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = super().batch_shapes()
        shape = (self.config.batch_size, len(self.class_names))
        return {"image": shapes["image"], "labels": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        return models.build(self.config, len(self.class_names), rngs, self.platform)

    def start(self, arrays: Params) -> Params:
        if not self.config.init_from:
            return arrays
        return weights.starting_params(to_path(self.config.init_from), self.config, arrays, self.class_names)

    def adopt(self, metadata: Mapping[str, Any]) -> None:
        self.threshold = metadata.get("threshold", THRESHOLD)

    def metadata(self) -> dict:
        """Adds `threshold`, the probability from which on a class is predicted."""
        return {**super().metadata(), "threshold": self.threshold}

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes images and labels alike by `mixup` and `cutmix`, and makes targets of the labels."""
        config = self.config
        images = self.normalise(batch["image"])
        targets = batch["labels"] * (1 - config.label_smoothing) + config.label_smoothing / 2
        if config.mixup or config.cutmix:
            mix = draw_mix(key, image_hw(config), config.mixup, config.cutmix)
            images, targets = mix_images(images, mix), mix_rows(targets, mix)
        return {**batch, "image": images, "target": targets}

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        logits, targets = model(batch["image"], keys), batch["target"]
        positive = jnp.asarray(self.positive_weights(), jnp.float32)
        loss = -positive * targets * jax.nn.log_sigmoid(logits)
        loss -= (1 - targets) * jax.nn.log_sigmoid(-logits)
        return {"loss": mean_of(loss)}, {}

    def positive_weights(self) -> Float[np.ndarray, " classes"]:
        """Returns the weight of each class's positives: 1, or the training images' negatives per positive."""
        if self.config.positive_weights == "none" or isinstance(self.data, Described):
            return np.ones(len(self.class_names))
        share = self.data.train.targets["labels"].mean(axis=0)
        return np.minimum((1 - share) / np.maximum(share, 1e-9), MOST_WEIGHT)

    def score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        logits = self.outputs.of(model, self.normalise(batch["image"]), flip=self.config.eval_flip)
        loss = optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(axis=1)
        return {"loss": loss, "logit": logits, "target": batch["labels"]}

    def metrics(self) -> Sequence[Metric]:
        return Mean(), MultiLabelScores()

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        """See the base class; keeps the threshold, for the checkpoint that is saved next."""
        found = super().evaluate(model, batches)
        self.threshold = found["threshold"]
        return found

    def report(self, collected: Collected) -> Report:
        """Returns the columns of `MultiLabelScores.per_class`, at the threshold that suits these images."""
        metric, total = MultiLabelScores(), collected.total(MultiLabelScores)
        columns = metric.per_class(total, metric.result(total)["threshold"])
        return class_report(self.class_names, columns)

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        """Returns the `top` most probable classes, or more if more reach the threshold, and which do."""
        shares = outputs["probability"]
        count = max(top, int((shares >= self.threshold).sum()))
        return {
            "threshold": self.threshold,
            "predictions": [
                {
                    "class": self.class_names[place],
                    "probability": float(shares[place]),
                    "predicted": bool(shares[place] >= self.threshold),
                }
                for place in np.argsort(-shares, kind="stable")[:count]
            ],
        }

    def prediction_lines(self, prediction: dict) -> list[str]:
        width = max(map(len, self.class_names))
        return [
            f"  {each['class']:<{width}}  {each['probability']:6.2%}{'  yes' if each['predicted'] else ''}"
            for each in prediction["predictions"]
        ]

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Names the classes of each image, of mixed ones with their shares."""
        return self.drawn(prepared["image"]), [self._caption(row) for row in np.asarray(prepared["target"])]

    def _caption(self, target: np.ndarray) -> str:
        smoothing = self.config.label_smoothing
        shares = (target - smoothing / 2) / (1 - smoothing)
        named = [(self.class_names[place], shares[place]) for place in np.flatnonzero(shares > 0.005)]
        return ", ".join(name if share > 0.995 else f"{name} {share:.0%}" for name, share in named)
