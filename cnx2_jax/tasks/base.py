"""The base class of tasks. A task is one file: a model with its keys, data, loss, metrics and pictures.

A new task derives from `Task`, gives itself a name, and overrides what the defaults here do not fit; the
smallest one needs `init`, `loss` and `score`. No other file has to change (docs/contributing.md).
"""

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped, UInt8
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.bands import BATCH_DTYPES
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import image_hw, register_task
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation.features import predictions
from cnx2_jax.evaluation.heatmaps import heatmaps
from cnx2_jax.evaluation.metrics import Collected, Mean, Metric, Scorer, evaluate
from cnx2_jax.evaluation.outputs import ONE_CLASS, Outputs
from cnx2_jax.evaluation.report import Report
from cnx2_jax.models import pixels
from cnx2_jax.models.convnextv2 import check_size
from cnx2_jax.models.state import Params
from cnx2_jax.observe.overlay import heat_overlay
from cnx2_jax.observe.progress import watched
from cnx2_jax.tasks import models, pictures, stem
from cnx2_jax.train.task import Data
from cnx2_jax.train.terms import Terms
from cnx2_jax.types import Batch, HostBatch, Metrics

TASKS: dict[str, type["Task"]] = {}


TTA = ("flip",)
TTA_HELP = "average what the model gives for each image and its mirror image; the same as the key eval_flip"


class Described:
    """A stand-in for data: its counts alone, which are enough to build and compile a task, not to train it.

    Args:
      num_train, num_val: how many images there are.
      class_names: the name of each class; empty where images have none.
    """

    def __init__(self, num_train: int = 1, num_val: int = 1, class_names: Sequence[str] = ()):
        self.num_train, self.num_val = num_train, num_val
        self.class_names = tuple(class_names)

    def train_batches(self, start_step: int, *, process_index: int = 0, process_count: int = 1):
        raise AssertionError("there are no images, only their description")

    def eval_batches(self, *, process_index: int = 0, process_count: int = 1):
        raise AssertionError("there are no images, only their description")


class Task:
    """A model on the data of a config; the base class, whose defaults suit images with one label each.

    Args:
      config: the run's.
      platform: what the model is built for: `cpu`, `tpu` or `gpu`; JAX's default backend by default.
      data: used instead of opening the config's data, such as `Described`.
    """

    name: ClassVar[str] = ""
    # The metric of `evaluate` by which checkpoints are ranked, and which end of it is good.
    best: ClassVar[tuple[str, Literal["max", "min"]]] = ("loss", "min")
    # The field of an example that training learns from, and what the numbers of a classifier's head mean.
    wanted: ClassVar[str] = "label"
    outputs: ClassVar[Outputs] = ONE_CLASS
    # Whether `report` and `write_results` give anything, and whether `predict` gives feature vectors and
    # pictures.
    gives_report: ClassVar[bool] = False
    writes_results: ClassVar[bool] = False
    gives_features: ClassVar[bool] = True
    gives_pictures: ClassVar[bool] = False
    # Whether `heatmaps` explains predictions, and whether it explains every output, not the largest alone.
    gives_heatmaps: ClassVar[bool] = False
    explains_each: ClassVar[bool] = False
    # Whether `prepare` normalises images.
    prepare_normalises: ClassVar[bool] = False
    # Least and greatest value of the task's own keys.
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __init_subclass__(cls, *, name: str, **options):
        super().__init_subclass__(**options)
        cls.name = name
        TASKS[name] = cls
        register_task(name, cls.add_keys, cls.ranges)

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        """Adds the task's own keys with their defaults."""

    def __init__(self, config: ConfigDict, platform: str | None = None, data: Data | None = None):
        self.config = config
        self.platform = platform or jax.default_backend()
        if data is not None:
            self.data = data

    def check(self) -> None:
        """Checks keys against each other, before anything is opened; called by `make_task`.

        Raises:
          UserError: the image size is not a multiple of the stride, or a tuple of per-channel or range values
            has the wrong length or order.
        """
        check_keys(self.config)

    def check_data(self) -> None:
        """Raises UserError if the data does not fit the task; called by `make_task`, not for given data."""

    @functools.cached_property
    def data(self) -> Any:
        """The batches, opened at first use: `ImageData` of the config, or what `__init__` was given."""
        return self.open_data()

    def open_data(self) -> Any:
        """Opens the config's data.

        Raises:
          UserError: it cannot be opened, or there is nothing to evaluate on.
        """
        # TensorFlow is needed for reading images alone.
        from cnx2_jax.data.images import ImageData

        data = ImageData(self.config, self.wanted)
        if not data.num_val:
            raise UserError(
                f"no validation images with data.val_fraction {self.config.data.val_fraction}; raise it, or "
                "put some into a folder val/ beside train/"
            )
        return data

    @property
    def images(self) -> Any:
        """The images: the data itself, unless the task trains on what is computed from them."""
        return self.data

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class or, in regression, of each target; empty where there are none."""
        return self.data.class_names

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of a global batch, without reading one."""
        count = self.config.batch_size
        return {
            "image": jax.ShapeDtypeStruct(
                (count, *image_hw(self.config), self.config.model.in_chans), jnp.dtype(self.config.data.dtype)
            ),
            "label": jax.ShapeDtypeStruct((count,), jnp.int32),
        }

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with fresh weights; traced, so that each device makes only its share."""
        raise NotImplementedError

    def start(self, arrays: Params) -> Params:
        """Returns the arrays that step 0 begins with, given fresh ones by name."""
        return arrays

    def begin(self, arrays: Params) -> None:
        """Called once with the initial or restored arrays, before any batch is asked for."""

    def adopt(self, metadata: Mapping[str, Any]) -> None:
        """Called with the metadata of a checkpoint whose arrays are used, to resume, evaluate or predict.

        A task restores values that `metadata` stored because they come from data, such as a threshold.
        """

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns a global batch as `loss` takes it; what samples do to each other, such as mixup, goes here.

        `key` is a function of the seed and the step. Traced, not differentiated.
        """
        return batch

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        """Returns the terms of the loss, which are added, and metrics to log, both over this part of a batch.

        `keys` holds one random key per sample, a function of the seed, the step and the sample's position
        in the global batch: draw from nothing else.
        """
        raise NotImplementedError

    def score(self, model: Any, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        """Returns what the metrics are computed from: arrays with the sample as first axis, by name.

        Args:
          model: in evaluation mode.
          batch: of the evaluation.
          positions: int32 `[B]`, each sample's place in the pass, to draw from.
        """
        raise NotImplementedError

    def metrics(self) -> Sequence[Metric]:
        """Returns the metrics of an evaluation; by default the mean of each score."""
        return (Mean(),)

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> Metrics:
        """Returns the metrics over one pass of padded batches."""
        return evaluate(self, model, batches)

    def reporter(self) -> Scorer:
        """Returns what scores the samples for `report`: by default the task itself."""
        return self

    def report(self, collected: Collected) -> Report:
        """Returns what `cnx2 evaluate --report` writes, from the totals of the metrics of `reporter`."""
        raise NotImplementedError

    def write_results(self, collected: Collected, folder: Path) -> None:
        """Writes the results for each image, for `cnx2 evaluate --out`.

        Args:
          collected: of this task's metrics.
          folder: a path that does not exist.

        Raises:
          UserError: the folder exists or cannot be written.
        """
        raise NotImplementedError

    def predict(self, model: Any, source: Any, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields what the model makes of each image, in order.

        Args:
          model: from a checkpoint of this task.
          source: a `data.sources.Source` with a field "image".
          batch_size: images per batch.

        Yields:
          By default `features` `[dim]`, the head's input, and `probability` `[classes]`: of a classifier, or
          of an FCMAE's encoder.

        Raises:
          UserError: an image cannot be read.
        """
        from cnx2_jax.data.images import eval_batches  # TensorFlow is needed for reading images alone

        config = self._prediction_config(source, batch_size)
        batches = watched(eval_batches(source, config), source.num_records)
        encoder, flip = models.without_decoder(model), bool(config.get("eval_flip", False))
        for vectors, probabilities in predictions(encoder, config, batches, self.outputs, flip=flip):
            for vector, probability in zip(vectors, probabilities, strict=True):
                yield {"features": vector, "probability": probability}

    def _prediction_config(self, source: Any, batch_size: int) -> ConfigDict:
        config = copy.deepcopy(self.config)
        config.batch_size = min(batch_size, source.num_records)
        config.data.unreadable = "error"  # training may skip images, but here each must give a result
        return config

    def heatmaps(self, model: Any, source: Any, batch_size: int) -> Iterator[dict[str, Image.Image]]:
        """Yields pictures of each image by name, with the places that raise its largest output, in order.

        Args:
          model, source, batch_size: see `predict`.

        Raises:
          UserError: an image cannot be read.
        """
        from cnx2_jax.data.images import eval_batches  # TensorFlow is needed for reading images alone

        config = self._prediction_config(source, batch_size)
        batches = watched(eval_batches(source, config), source.num_records, "drawing heat maps")
        for image, maps in heatmaps(model, config, batches, each=self.explains_each):
            names = ["heatmap"]
            if len(maps) > 1:
                names = [f"heatmap.{name}".replace("/", "_") for name in self.class_names]
            (drawn,) = self.drawable(image[None])
            overlays = [Image.fromarray(heat_overlay(drawn, heat)) for heat in maps]
            yield dict(zip(names, overlays, strict=True))

    def exported(self, model: Any) -> Any:
        """Returns the network that exports hold, whose results need nothing of the metadata."""
        return model

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        """Returns what `cnx2 predict --json` prints of one image, as JSON.

        Args:
          outputs: from `predict`.
          top: how many alternatives to name.
        """
        return {}

    def prediction_lines(self, prediction: dict) -> list[str]:
        """Returns a prediction as lines for people."""
        return [f"{name}: {value}" for name, value in prediction.items()]

    def prediction_pictures(self, outputs: Mapping[str, np.ndarray]) -> dict[str, Image.Image]:
        """Returns pictures of a prediction by name, which `cnx2 predict --out` writes."""
        return {}

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Returns training images as `cnx2 data` draws them, uint8 `[B, H, W, C]`, and a caption for each.

        Args:
          batch: as it was read.
          prepared: the same after `prepare`.
        """
        names = self.class_names
        return self.drawn(prepared["image"]), [names[label] if names else "" for label in batch["label"]]

    def drawn(self, images: Shaped[Array, "b height width c"]) -> UInt8[np.ndarray, "b height width colours"]:
        """Returns images that `prepare` made as uint8: themselves, or in false colours."""
        if not self.prepare_normalises:
            return self.drawable(images)
        if pictures.are_colours(self.config):
            return np.asarray(self.denormalise(images))
        return pictures.coloured(self.config, {"images": np.asarray(images)}, "images")["images"]

    def drawable(self, images: Shaped[Array | np.ndarray, "b height width c"]) -> np.ndarray:
        """Returns images as batches hold them, `[B, H, W, C]`, as uint8: themselves, or in false colours."""
        if pictures.are_colours(self.config):
            return np.asarray(images)
        normal = np.asarray(self.normalise(jnp.asarray(images)))
        return pictures.coloured(self.config, {"images": normal}, "images")["images"]

    def pictures(self, model: Any) -> dict[str, np.ndarray]:
        """Returns named uint8 pictures `[H, W, 3]` that show how the model does; often none."""
        return {}

    def metadata(self) -> dict:
        """Returns what a user of the weights must know, as JSON: it travels in every checkpoint."""
        return make_metadata(self.config, self.class_names)

    def normalise(self, images: Shaped[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        """Maps images to float32, by `data.mean` and `data.std`."""
        return pixels.normalise(images, self.config.data.mean, self.config.data.std)

    def normalised(
        self, images: Shaped[Array, "b height width c"], sizes: Int[Array, "b 2"]
    ) -> Float[Array, "b height width c"]:
        """Returns normalised images whose padding is 0, the mean colour, for these heights and widths."""
        inside = pixels.inside(images.shape[1:3], sizes)
        return jnp.where(inside[..., None], self.normalise(images), 0)

    def denormalise(self, images: Float[Array, "b height width c"]) -> UInt8[Array, "b height width c"]:
        """Inverse of `normalise`."""
        return pixels.denormalise(images, self.config.data.mean, self.config.data.std)


def use_tta(config: ConfigDict, tta: str | None) -> None:
    """Sets the key of a `--tta` option, in place.

    Raises:
      UserError: the task of the config has no such key.
    """
    if tta is None:
        return
    if "eval_flip" not in config:
        raise UserError(f"--tta {tta}: task '{config.task}' does not average views of an image; leave it out")
    config.eval_flip = True


def check_keys(config: ConfigDict) -> None:
    """Checks what a model can only refuse late: size, channels and normalisation against each other.

    Raises:
      UserError: the image size is not a multiple of the stride, a tuple has not one value per channel, or a
        choice is unknown.
    """
    model, data = config.model, config.data
    check_size(*image_hw(config), 8 * model.patch_size)
    if data.dtype not in BATCH_DTYPES:
        raise UserError(
            f"unknown data.dtype '{data.dtype}'{nearest(data.dtype, BATCH_DTYPES)}; known: "
            f"{', '.join(BATCH_DTYPES)}"
        )
    pictures.projection(config)
    if "init_bands" in config:
        stem.check(config.init_bands)
    for name in ("mean", "std"):
        if len(data[name]) != model.in_chans:
            raise UserError(
                f"data.{name} has {len(data[name])} value(s) for model.in_chans {model.in_chans}; give one "
                "per channel"
            )
    if data.dtype == "uint8" and not 0 <= min(data.mean) <= max(data.mean) <= 1:
        raise UserError(f"data.mean {tuple(data.mean)} must be shares of the full range, from 0 to 1")
    if min(data.std) <= 0:
        raise UserError(f"data.std {tuple(data.std)} must be above 0")
    for name in ("crop_scale", "crop_ratio"):
        if len(data[name]) != 2 or not 0 < data[name][0] <= data[name][1]:
            raise UserError(f"data.{name} {tuple(data[name])} must be two numbers above 0, the smaller first")
