"""Semantic segmentation: UperNet on images with a class for each pixel."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.segmentation_keys import RANGES, add_segmentation_keys
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.metrics import Collected, ConfusionMatrix, Mean, Metric
from cnx2_jax.evaluation.report import Report, class_report
from cnx2_jax.evaluation.windows import average_over_windows, resized_to
from cnx2_jax.files import to_path
from cnx2_jax.models.convnextv2 import check_size
from cnx2_jax.models.resampling import resize
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.models.upernet import UperNet
from cnx2_jax.observe.overlay import draw_segmentations, overlay, palette
from cnx2_jax.observe.progress import watched
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Task
from cnx2_jax.train.terms import Term, Terms, mean_of
from cnx2_jax.types import Batch, HostBatch

HEADS = ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")
PICTURES = 6  # rows of the grid that an evaluation writes


class Segment(Task, name="segment"):
    """UperNet on the images and segmentation maps of a config, from scratch or from `config.init_from`.

    Evaluation slides windows over whole images and scores every pixel of the original resolution: `miou`,
    `mean_accuracy` and `pixel_accuracy` (see ConfusionMatrix), and `loss`, the cross-entropy of the labelled
    pixels of an image, averaged over images.

    Raises:
      UserError: see `Task`, `SegmentationData` and `weights.starting_params`; or a key is out of range.
    """

    best = ("miou", "max")
    gives_report = True
    gives_features = False
    gives_pictures = True
    ranges: ClassVar = {
        "model.channels": (1, float("inf")),
        "model.auxiliary_channels": (1, float("inf")),
        "model.dropout": (0, 0.999),
        "auxiliary_weight": (0, 1e9),
        "eval_window": (0, float("inf")),
        "eval_stride": (0, float("inf")),
        **RANGES,
    }

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.init_from = ""  # a checkpoint of any task to start from; empty: from scratch
        config.init_bands = ""  # how its stem fits images of other bands: mean, tile, map:R,G,B or fresh
        config.model.channels = 512  # of UperNet's decoding head
        config.model.auxiliary_channels = 256  # of the auxiliary head
        config.model.pool_scales = (1, 2, 3, 6)  # sides of the pooled grids of the pyramid pooling module
        config.model.dropout = 0.1  # of channels, before each classifier
        config.auxiliary_weight = 0.4  # of the auxiliary head's loss
        config.eval_window = 0  # side of the sliding window; 0: image_size
        config.eval_stride = 0  # from one window to the next; 0: two thirds of the window
        config.eval_flip = False  # average with the mirrored image
        add_segmentation_keys(config.data)

    def check(self) -> None:
        super().check()
        config = self.config
        window, stride = self.window
        check_size(*window, 8 * config.model.patch_size, "stride, for eval_window,")
        if not all(1 <= step <= side for step, side in zip(stride, window, strict=True)):
            raise UserError(
                f"eval_stride {config.eval_stride} must be at most the window, {window[0]}x{window[1]}: "
                "pixels between windows would have no class"
            )
        if config.batch_size // config.accumulation_steps < 2:
            raise UserError(
                f"batch_size {config.batch_size} with accumulation_steps {config.accumulation_steps}: "
                "BatchNorm needs at least two images per step; raise batch_size"
            )

    def check_data(self) -> None:
        if len(self.class_names) < 2:
            raise UserError(
                f"segmentation needs at least two classes, '{self.config.data.root}' has "
                f"{len(self.class_names)}; add the others to data.classes"
            )

    def open_data(self) -> Any:
        from cnx2_jax.data.segmentation import SegmentationData  # TensorFlow is needed for images alone

        data = SegmentationData(self.config)
        if not data.num_val:
            raise UserError(
                f"no validation images with data.val_fraction {self.config.data.val_fraction}; raise it"
            )
        return data

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the sliding window, and its steps down and to the right."""
        config = self.config
        window = (config.eval_window,) * 2 if config.eval_window else image_hw(config)
        stride = (
            (config.eval_stride,) * 2 if config.eval_stride else tuple(max(1, 2 * x // 3) for x in window)
        )
        return window, (stride[0], stride[1])

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        count, size = self.config.batch_size, image_hw(self.config)
        return {
            "image": jax.ShapeDtypeStruct((count, *size, self.config.model.in_chans), jnp.uint8),
            "image_size": jax.ShapeDtypeStruct((count, 2), jnp.int32),
            "map": jax.ShapeDtypeStruct((count, *size), jnp.uint8),
        }

    def init(self, rngs: nnx.Rngs) -> UperNet:
        model = self.config.model
        options = {name: model[name] for name in ("channels", "auxiliary_channels", "dropout", "pool_scales")}
        encoder = models.encoder_config(self.config, self.platform)
        return UperNet(encoder, num_classes=len(self.class_names), rngs=rngs, **options)

    def start(self, arrays: Params) -> Params:
        if not self.config.init_from:
            return arrays
        return weights.starting_params(
            to_path(self.config.init_from),
            self.config,
            arrays,
            self.class_names,
            encoder_prefix=UperNet.encoder_prefix,
            heads=HEADS,
        )

    def loss(self, model: UperNet, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        """Returns the cross-entropy of both heads, over all pixels of the crops.

        Pixels without a class count as 0 but are counted, as in mmsegmentation (`avg_non_ignore=False`).
        """
        images = self.normalised(batch["image"], batch["image_size"])
        target, labelled = self._labelled(batch["map"])
        size = target.shape[1], target.shape[2]
        logits = model(images, keys, train=True)
        main, auxiliary = resize(logits.main, size), resize(logits.auxiliary, size)
        weight = jnp.float32(target.size)
        loss = {
            "main_loss": Term(_cross_entropy(main, target, labelled).sum(), weight),
            "auxiliary_loss": Term(
                self.config.auxiliary_weight * _cross_entropy(auxiliary, target, labelled).sum(), weight
            ),
        }
        return loss, {"pixel_accuracy": mean_of(main.argmax(axis=-1) == target, labelled)}

    def score(self, model: UperNet, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        target, labelled = self._labelled(batch["map"])
        logits = self.full_logits(model, batch, batch["map_size"], (target.shape[1], target.shape[2]))
        loss = _cross_entropy(logits, target, labelled).sum(axis=(1, 2))
        return {
            "loss": loss / jnp.maximum(labelled.sum(axis=(1, 2)), 1),
            "target": jnp.where(labelled, target, -1),
            "predicted": logits.argmax(axis=-1),
        }

    def full_logits(
        self, model: UperNet, batch: Batch, targets: Int[Array, "b 2"], canvas: tuple[int, int]
    ) -> Float[Array, "b height width classes"]:
        """Returns logits of the original images, averaged over windows.

        With several scales or mirroring, probabilities are averaged, and these are their logarithms.

        Args:
          model: in evaluation mode.
          batch: `image`, `image_1` ..., one per scale, on their canvases, and `image_size` and so on.
          targets: height and width of the original images.
          canvas: height and width of the result.
        """
        names = [name for name in sorted(batch) if name.startswith("image") and not name.endswith("_size")]
        views = [
            (name, mirror)
            for name in names
            for mirror in ([False, True] if self.config.eval_flip else [False])
        ]
        found = [self._view(model, batch, name, mirror, targets, canvas) for name, mirror in views]
        if len(found) == 1:
            return found[0]
        total = sum(jax.nn.softmax(logits, axis=-1) for logits in found)
        return jnp.log(total / len(found))

    def _view(self, model: UperNet, batch: Batch, name: str, mirror: bool, targets, canvas) -> Array:
        window, stride = self.window
        images, sizes = batch[name], batch[f"{name}_size"]
        images = self.normalised(images, sizes)
        if mirror:
            images = _mirrored(images, sizes[:, 1])
        missing = [max(0, w - side) for w, side in zip(window, images.shape[1:3], strict=True)]
        images = jnp.pad(images, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
        logits = average_over_windows(model.segment, images, sizes, window, stride)
        if mirror:
            logits = _mirrored(logits, sizes[:, 1])
        return resized_to(logits, sizes, targets, canvas)

    def metrics(self) -> Sequence[Metric]:
        return Mean(), ConfusionMatrix(len(self.class_names))

    def report(self, collected: Collected) -> Report:
        total = collected.total(ConfusionMatrix)
        return class_report(self.class_names, ConfusionMatrix(len(self.class_names)).per_class(total))

    def _labelled(self, maps: Array) -> tuple[Int[Array, "b h w"], Bool[Array, "b h w"]]:
        """Returns the class of each pixel, and whether it has one."""
        return maps.astype(jnp.int32), maps < len(self.class_names)

    def predict(self, model: UperNet, source: Any, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields `image`, uint8 `[H, W, C]`, and `map`, uint8 `[H, W]`, of each image at its own size.

        Images are taken one at a time, on canvases of few sizes, so that few programs are compiled.
        """
        # These load TensorFlow.
        from cnx2_jax.data.prepared import CANVAS_STEP, on_canvas
        from cnx2_jax.data.segmentation import name_at, prediction_images
        from cnx2_jax.data.sizes import canvas

        graph, arrays = split(model)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for prepared in prediction_images(source, self.config):
                batch = {
                    "original": prepared.original,
                    "map_size": np.array([prepared.original.shape[:2]], np.int32),
                    "mask": np.ones(1, bool),
                }
                for scale, image in enumerate(prepared.scaled):
                    batch[name_at(scale)] = on_canvas(image, CANVAS_STEP)
                    batch[f"{name_at(scale)}_size"] = np.array([image.shape[:2]], np.int32)
                yield batch

        for batch in watched(batches(), source.num_records):
            image = batch.pop("original")
            size = canvas(batch["map_size"], CANVAS_STEP)
            found = np.asarray(_predicted(self, graph, arrays, batch, size))[0]
            yield {"image": image, "map": found[: image.shape[0], : image.shape[1]].astype(np.uint8)}

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        """Returns `shares`: the share of the pixels of each class that occurs, the largest first."""
        found = outputs["map"]
        order = _largest(found, len(self.class_names))
        return {"shares": {self.class_names[c]: float((found == c).mean()) for c in order}}

    def prediction_lines(self, prediction: dict) -> list[str]:
        width = max(map(len, self.class_names))
        return [f"  {name:<{width}}  {share:6.2%}" for name, share in prediction["shares"].items()]

    def prediction_pictures(self, outputs: Mapping[str, np.ndarray]) -> dict[str, Image.Image]:
        """Returns `overlay`, and `map`: a palette image whose pixels are class numbers."""
        classes = len(self.class_names)
        numbers = Image.fromarray(outputs["map"])
        numbers.putpalette(palette(classes).tobytes())
        return {
            "overlay": Image.fromarray(overlay(outputs["image"], outputs["map"], classes)),
            "map": numbers,
        }

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Draws the maps over the images and names the largest classes."""
        names = self.class_names
        drawn = [
            overlay(image, map, len(names)) for image, map in zip(batch["image"], batch["map"], strict=True)
        ]
        return np.stack(drawn), [
            ", ".join(names[c] for c in _largest(map, len(names))) for map in batch["map"]
        ]

    def pictures(self, model: UperNet) -> dict[str, np.ndarray]:
        """Returns `segmentations`: image, true map and predicted map of a few validation images."""
        batch = next(iter(self.data.eval_batches()))
        rows = np.flatnonzero(batch["mask"])[:PICTURES]
        batch = {name: array[rows] for name, array in batch.items() if isinstance(array, np.ndarray)}
        graph, arrays = split(model)
        # One device is enough for a few images, and it spares dividing them over a mesh.
        canvas = batch["map"].shape[1], batch["map"].shape[2]
        predicted = np.asarray(_predicted(self, graph, jax.device_get(arrays), batch, canvas))
        shown = [
            (image[: size[0], : size[1]], truth[:height, :width], found[:height, :width])
            for image, size, truth, (height, width), found in zip(
                batch["image"], batch["image_size"], batch["map"], batch["map_size"], predicted, strict=True
            )
        ]
        return {"segmentations": draw_segmentations(shown, len(self.class_names))}


def _cross_entropy(logits: Array, target: Array, labelled: Array) -> Float[Array, "b height width"]:
    """Returns the cross-entropy of every pixel, 0 where it has no class."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(labelled, target, 0))
    return jnp.where(labelled, losses, 0)


def _mirrored(maps: Float[Array, "b height width c"], widths: Int[Array, " b"]) -> Array:
    """Mirrors the left `widths` columns of each map, left to right; its own inverse."""
    columns = jnp.arange(maps.shape[2])
    mirrored = jnp.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    return jnp.take_along_axis(maps, mirrored[:, None, :, None], axis=2)


def _largest(map: np.ndarray, classes: int) -> np.ndarray:
    """Returns the classes of a map, the largest first."""
    counts = np.bincount(map[map < classes], minlength=classes)
    return np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]


@partial(jax.jit, static_argnames=("task", "graph", "canvas"))
def _predicted(
    task: Segment, graph: nnx.GraphDef, arrays: Params, batch: Batch, canvas: tuple[int, int]
) -> Int[Array, "b h w"]:
    """Returns the class of each pixel, on a canvas in which every original image fits."""
    return task.full_logits(merge(graph, arrays), batch, batch["map_size"], canvas).argmax(axis=-1)
