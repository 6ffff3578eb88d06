"""Regression: numbers per image."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation.labels import RegressionErrors, regression_report
from cnx2_jax.evaluation.metrics import Collected, Mean, Metric
from cnx2_jax.evaluation.outputs import VALUES
from cnx2_jax.evaluation.report import Report
from cnx2_jax.files import to_path
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Described, Task
from cnx2_jax.train.terms import Terms, mean_of
from cnx2_jax.types import Batch, HostBatch

LOSSES = ("squared", "huber")


class Standards(NamedTuple):
    """Mean and deviation of each target over the training images; the model gives standardised targets."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class Regress(Task, name="regress"):
    """An encoder with one output per target, from scratch or from `config.init_from`.

    Targets are standardised over the training images; mean and deviation are part of the checkpoint, so that
    predictions and exports have the targets' own units. Evaluation gives `mae`, `rmse` and `r2` (see
    `RegressionErrors`) in these units, and `loss`, of standardised targets.

    Raises:
      UserError: an unknown `regression_loss`, a target that is the same for all training images; see `Task`
        and `weights.starting_params`.
    """

    best = ("rmse", "min")
    gives_report = True
    gives_heatmaps = True
    explains_each = True
    wanted = "value"
    outputs = VALUES
    ranges: ClassVar = {"huber_delta": (1e-6, 1e6)}

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.init_from = ""  # a checkpoint to start from; empty: from scratch
        config.init_bands = ""  # how its stem fits images of other bands: mean, tile, map:R,G,B or fresh
        config.model.head_init_scale = 1.0  # factor on the initial weights of the head
        config.regression_loss = "squared"  # or huber: linear in errors above huber_delta
        config.huber_delta = 1.0  # in deviations of the target
        config.eval_flip = False  # average predictions with the mirrored image
        config.data.labels = ""  # a CSV file of the targets of each image in data.root
        config.data.targets = ("value",)  # its columns to learn

    def check(self) -> None:
        super().check()
        chosen = self.config.regression_loss
        if chosen not in LOSSES:
            raise UserError(
                f"unknown regression_loss '{chosen}'{nearest(chosen, LOSSES)} (known: {', '.join(LOSSES)})"
            )

    def check_data(self) -> None:
        for name, deviation in zip(self.class_names, self.standards.deviation, strict=True):
            if not deviation:
                raise UserError(
                    f"target '{name}' is the same for all training images; leave it out of data.targets"
                )

    @functools.cached_property
    def standards(self) -> Standards:
        """The standards of the training images, or of the checkpoint that was adopted."""
        if isinstance(self.data, Described):
            return Standards((0.0,) * len(self.class_names), (1.0,) * len(self.class_names))
        values = self.data.train.targets["value"]
        # The mean of equal numbers may differ from them in the last bit.
        constant = (values == values[:1]).all(axis=0)
        deviation = np.where(constant, 0, values.std(axis=0))
        return Standards(tuple(values.mean(axis=0).tolist()), tuple(deviation.tolist()))

    def adopt(self, metadata: Mapping[str, Any]) -> None:
        self.standards = _standards(metadata)

    def metadata(self) -> dict:
        """Adds `standards`: mean and deviation of each target."""
        return {**super().metadata(), "standards": self.standards._asdict()}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = super().batch_shapes()
        shape = (self.config.batch_size, len(self.class_names))
        return {"image": shapes["image"], "value": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        return models.build(self.config, len(self.class_names), rngs, self.platform)

    def start(self, arrays: Params) -> Params:
        """Returns the starting weights; a head of the same targets is adapted to these images' standards."""
        if not self.config.init_from:
            return arrays
        path = to_path(self.config.init_from)
        arrays = weights.starting_params(path, self.config, arrays, self.class_names)
        metadata = checkpoint.read_metadata(checkpoint.find(path))
        if metadata["config"]["task"] != self.name or metadata["class_names"] != list(self.class_names):
            return arrays
        theirs, ours = (np.array(each, np.float64) for each in (_standards(metadata), self.standards))
        head = {name: np.asarray(arrays[f"head.{name}"], np.float64) for name in ("kernel", "bias")}
        kernel = head["kernel"] * theirs[1] / ours[1]
        bias = (head["bias"] * theirs[1] + theirs[0] - ours[0]) / ours[1]
        return {**arrays, "head.kernel": kernel.astype(np.float32), "head.bias": bias.astype(np.float32)}

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        predicted = model(self.normalise(batch["image"]), keys)
        return {"loss": mean_of(self._losses(predicted, batch["value"]))}, {}

    def _losses(self, predicted: Float[Array, "b targets"], values: Float[Array, "b targets"]) -> Array:
        """Returns the loss of each standardised target."""
        mean, deviation = (jnp.asarray(each, jnp.float32) for each in self.standards)
        errors = predicted - (values - mean) / deviation
        if self.config.regression_loss == "huber":
            return optax.huber_loss(errors, delta=self.config.huber_delta)
        return errors**2

    def score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        predicted = self.outputs.of(model, self.normalise(batch["image"]), flip=self.config.eval_flip)
        loss = self._losses(predicted, batch["value"]).mean(axis=1)
        return {"loss": loss, "predicted": predicted, "target": batch["value"]}

    def metrics(self) -> Sequence[Metric]:
        return Mean(), RegressionErrors(self.class_names, *self.standards)

    def report(self, collected: Collected) -> Report:
        metric = RegressionErrors(self.class_names, *self.standards)
        predicted, target = metric.values(collected.total(RegressionErrors))
        return regression_report(predicted, target, self.class_names)

    def predict(self, model: ConvNeXtV2, source: Any, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields `features` `[dim]`, and `value` float64 `[targets]` in their own units."""
        mean, deviation = map(np.array, self.standards)
        for outputs in super().predict(model, source, batch_size):
            yield {"features": outputs["features"], "value": outputs["probability"] * deviation + mean}

    def exported(self, model: ConvNeXtV2) -> ConvNeXtV2:
        """Returns a network whose head gives the targets in their own units."""
        mean, deviation = map(np.array, self.standards)
        graph, arrays = split(model)
        head = {
            "head.kernel": jnp.asarray(np.asarray(arrays["head.kernel"]) * deviation, jnp.float32),
            "head.bias": jnp.asarray(np.asarray(arrays["head.bias"]) * deviation + mean, jnp.float32),
        }
        return merge(graph, {**arrays, **head})

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        return {"values": dict(zip(self.class_names, outputs["value"].tolist(), strict=True))}

    def prediction_lines(self, prediction: dict) -> list[str]:
        width = max(map(len, self.class_names))
        return [f"  {name:<{width}}  {value:.6g}" for name, value in prediction["values"].items()]

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Shows the values of each image."""
        return self.drawable(batch["image"]), [
            ", ".join(f"{value:.4g}" for value in row) for row in batch["value"]
        ]


def _standards(metadata: Mapping[str, Any]) -> Standards:
    stored = metadata.get("standards")
    if stored is None:
        raise UserError(
            f"the checkpoint is of task '{metadata['config']['task']}', not of regression; give that of a "
            "regression run"
        )
    return Standards(tuple(stored["mean"]), tuple(stored["deviation"]))
