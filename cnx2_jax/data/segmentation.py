"""Images with a class per pixel: the examples of semantic segmentation that a config asks for.

Training resizes, crops, mirrors and distorts as mmsegmentation does. Evaluation resizes whole images, at one
or several scales, and leaves the maps as they are, because results count at the original resolution.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from cnx2_jax.configuration import image_hw
from cnx2_jax.data import faults, sizes
from cnx2_jax.data.augment import Augmentation, make_augmentation
from cnx2_jax.data.fields import Arrays, Canvas, Entries, Field, Image, SegmentationMap, example_arrays
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.pipeline import Examples
from cnx2_jax.data.prepared import Bounds, PreparedImage, at_scales, prepared_images
from cnx2_jax.data.resizing import PLAIN_BILINEAR
from cnx2_jax.data.sources import Source, open_source
from cnx2_jax.data.spectrograms import refuse_spec_augment
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

REDRAWS = 10  # of a crop
_STRIDE = 32  # sides of evaluation images are multiples of it


class SegmentationData(Examples):
    """The examples of one run.

    Training batches have {"image": uint8 [b, h, w, C], "image_size": int32 [b, 2], "map": uint8 [b, h, w]},
    where h and w are `config.image_size`. Smaller images are padded with 0, maps with `data.ignore`;
    "image_size" is the height and width without padding.

    Validation batches have "image" and "image_size" for the first of `data.eval_scales`, "image_1" and
    "image_1_size" for the second and so on, each padded to a canvas in which every image fits; and "map",
    uint8 [b, H, W], of the original resolution, padded with `data.ignore`, with its size in "map_size".
    """

    def __init__(self, config: Any):
        """Opens both splits of `config.data`; see `open_source` for errors.

        Args:
          config: the config of the run. Read here: `seed`, `batch_size` (global), `image_size`,
            `model.in_chans` (1 or 3), and of `data` the keys of `add_segmentation_keys` and `source`, `root`,
            `val_fraction`, `flip`, `vflip`, `quarter_turns`, `augment`, `mean`,
            `unreadable` and `max_unreadable`.

        Raises:
          UserError: as `open_source`, `make_augmentation` and `faults.Tolerance`; the source has no maps; or
            a key is out of its range.
        """
        data, seed = config.data, config.seed
        low, high = _pair(data.ratio_range)
        scales = _scales(data)
        refuse_spec_augment(config)
        if data.val_source:
            raise UserError(
                f"data.val_source '{data.val_source}': segmentation takes its validation images from "
                "data.source; set it to ''"
            )
        train, val = (open_source(data, split, seed) for split in ("train", "val"))
        fields = _fields(train, config)
        train_transform = SegmentationTransform(
            fields,
            size=image_hw(config),
            bounds=(data.resize_long, data.resize_short),
            ratios=(low, high),
            class_share=data.class_share,
            symmetries=Symmetries.of(config),
            augment=make_augmentation(data.augment, [round(255 * mean) for mean in data.mean], fields),
        )
        originals = sizes.image_sizes(val) if val.num_records else np.zeros([0, 2], np.int32)
        eval_transform = SegmentationEvalTransform(
            _fields(val, config),
            bounds=scales,
            canvases=tuple(
                sizes.canvas(sizes.fitted(tf.constant(originals), *bounds).numpy(), _STRIDE)
                for bounds in scales
            ),
            map_canvas=sizes.canvas(originals),
        )
        tolerance = faults.Tolerance(data.unreadable, data.max_unreadable)
        super().__init__(train, val, train_transform, eval_transform, seed, config.batch_size, tolerance)


@dataclasses.dataclass(frozen=True)
class SegmentationTransform:
    """Random resizing, a crop that no class dominates, mirroring and turning, photometric changes, padding.

    Attributes:
      fields: "image", an image, and "map", a segmentation map.
      size: height and width of crops.
      bounds: of the longer and the shorter side of the resized image, before the random ratio.
      ratios: least and greatest ratio.
      class_share: share of the labelled pixels of a crop that one class may have; 1 for any share.
      symmetries: in which examples are drawn.
      augment: applied to the image; None for no change.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    bounds: Bounds
    ratios: tuple[float, float]
    class_share: float
    symmetries: Symmetries
    augment: Augmentation | None

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`."""
        ratio_draw, crop_draws, symmetry_draws, _ = self._draws(seed)
        values = {name: field.decode(record[name]) for name, field in self.fields.items()}
        source = tf.shape(values["image"])[:2]
        resized = self._resized(source, ratio_draw[0])
        visible = tf.minimum(resized, self.size)
        offset = self._offset(Geometry(source, resized).map(values["map"]), tf.reshape(crop_draws, [-1, 2]))
        step = Geometry(
            source,
            resized,
            offset=offset,
            visible=visible,
            **self.symmetries.drawn(symmetry_draws)._asdict(),
            kernel=PLAIN_BILINEAR,
        )
        return {name: field.moved(values[name], step) for name, field in self.fields.items()}

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`."""
        *_, augment_draws = self._draws(seed)

        def photometric(image: tf.Tensor) -> tf.Tensor:
            changed = self.augment.apply(image, augment_draws) if self.augment else image
            return tf.ensure_shape(changed, image.shape)

        changed = {name: field.changed(values[name], photometric) for name, field in self.fields.items()}
        return example_arrays(self.fields, changed, self.size)

    def _draws(self, seed: tf.Tensor) -> list[tf.Tensor]:
        parts = (1, 2 * (1 + REDRAWS), self.symmetries.draws, self.augment.draws if self.augment else 0)
        return tf.split(tf.random.stateless_uniform([sum(parts)], seed), parts)

    def _resized(self, source: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
        low, high = self.ratios
        ratio = low + (high - low) * tf.cast(draw, tf.float64)
        # mmsegmentation truncates both bounds.
        return sizes.fitted(source, *(tf.cast(bound * ratio, tf.int32) for bound in self.bounds))

    def _offset(self, classes: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Returns top and left, int32 [2], of the first crop that no class dominates, or of the last one.

        Args:
          classes: uint8 [h, w], the resized map.
          draws: float32 [1 + REDRAWS, 2], uniform in [0, 1).
        """
        margin = tf.maximum(tf.shape(classes) - self.size, 0)
        offsets = tf.minimum(tf.cast(draws * tf.cast(margin + 1, tf.float32), tf.int32), margin)
        if self.class_share >= 1:
            return offsets[0]

        def dominated(number: tf.Tensor) -> tf.Tensor:
            (top, left), (height, width) = tf.unstack(offsets[number]), self.size
            counts = self._counts(classes[top : top + height, left : left + width])
            share = tf.reduce_max(counts) / tf.maximum(tf.reduce_sum(counts), 1)
            return (tf.math.count_nonzero(counts) <= 1) | (share >= self.class_share)

        def redraw(number: tf.Tensor) -> tf.Tensor:
            return tf.cond(number < REDRAWS, lambda: dominated(number), lambda: tf.constant(False))

        (chosen,) = tf.while_loop(redraw, lambda number: (number + 1,), [tf.constant(0)])
        return offsets[chosen]

    def _counts(self, classes: tf.Tensor) -> tf.Tensor:
        """Returns how many pixels each class has, int32 [256]."""
        values = tf.reshape(tf.cast(classes, tf.int32), [-1])
        counts = tf.math.bincount(values, minlength=256, maxlength=256)
        return tf.where(tf.range(256) == cast(SegmentationMap, self.fields["map"]).ignore, 0, counts)


@dataclasses.dataclass(frozen=True)
class SegmentationEvalTransform:
    """Whole images, resized to one or several scales, and whole maps, all padded to static sizes.

    Attributes:
      fields: "image", an image, and "map", a segmentation map.
      bounds: for each scale, those of the longer and the shorter side.
      canvases: for each scale, the height and width that images are padded to.
      map_canvas: the height and width that maps are padded to.
    """

    fields: Mapping[str, Field]
    bounds: tuple[Bounds, ...]
    canvases: tuple[Canvas, ...]
    map_canvas: Canvas

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`; depends on no seed."""
        del seed
        image = self.fields["image"].decode(record["image"])
        source = tf.shape(image)[:2]
        classes = self.fields["map"].decode(record["map"])
        return {
            **{name_at(scale): resized for scale, resized in enumerate(at_scales(image, self.bounds))},
            "map": self.fields["map"].moved(classes, Geometry(source, source)),
        }

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`."""
        del seed
        arrays = self.fields["map"].arrays("map", values["map"], self.map_canvas)
        arrays["map_size"] = tf.shape(values["map"])
        for scale, canvas in enumerate(self.canvases):
            name = name_at(scale)
            arrays |= self.fields["image"].arrays(name, values[name], canvas)
        return arrays


def prediction_images(source: Source, config: Any) -> Iterator[PreparedImage]:
    """Yields the images of any source, at each of `data.eval_scales`; see `prepared_images`.

    Args:
      source: has a field "image".
      config: as for `SegmentationData`; `data.source` and its companions are not read.

    Raises:
      UserError: a key is out of its range; or, from the iterator, an image cannot be read.
    """
    return prepared_images(source, _image_field(config), _scales(config.data))


def name_at(scale: int) -> str:
    """Returns the name of the images at scale number `scale` in validation batches."""
    return f"image_{scale}" if scale else "image"


def _image_field(config: Any) -> Image:
    return Image().configured(config)


def _fields(source: Source, config: Any) -> Mapping[str, Field]:
    """Returns the fields that segmentation uses, images in the channels that the model has."""
    if "map" not in source.fields:
        raise UserError(
            f"data.source '{config.data.source}' has no maps; segmentation takes masks, ade20k or scenes"
        )
    return {"image": _image_field(config), "map": source.fields["map"]}


def _pair(ratios: tuple[float, ...]) -> tuple[float, float]:
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
        raise UserError(f"data.ratio_range {tuple(ratios)} must be two positive numbers, smaller first")
    return ratios[0], ratios[1]


def _scales(data: Any) -> tuple[Bounds, ...]:
    """Returns the bounds of the longer and the shorter side at each scale of evaluation."""
    scales = tuple(data.eval_scales)
    if not scales or min(scales) <= 0:
        raise UserError(f"data.eval_scales {scales} must be one or more positive numbers, such as (1.0,)")
    # mmsegmentation truncates both bounds.
    bounds = tuple((int(data.eval_long * scale), int(data.eval_short * scale)) for scale in scales)
    if min(map(min, bounds)) < 1:
        raise UserError(
            f"data.eval_scales {min(scales)}: data.eval_long {data.eval_long} or data.eval_short "
            f"{data.eval_short} times it is less than a pixel; raise one of them"
        )
    return bounds
