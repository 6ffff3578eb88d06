"""Images with objects: the examples of object detection and instance segmentation that a config asks for.

Training resizes by a random ratio, crops and mirrors as mmdetection's large-scale jitter does. Evaluation
resizes whole images; detections are compared with the annotations of the files, in their pixels.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from cnx2_jax.configuration import image_hw
from cnx2_jax.data import faults, sizes
from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.augment import Augmentation, make_augmentation
from cnx2_jax.data.fields import Arrays, Canvas, Entries, Field, Image, Instances, example_arrays
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.pipeline import Examples
from cnx2_jax.data.prepared import PreparedImage, prepared_images
from cnx2_jax.data.resizing import PLAIN_BILINEAR
from cnx2_jax.data.sources import Source, open_source
from cnx2_jax.data.spectrograms import refuse_spec_augment
from cnx2_jax.data.symmetries import Symmetries, Symmetry
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.types import HOST

REDRAWS = 3  # of a crop
_LEAST_SIDE = 32  # of a training image, in pixels


class DetectionData(Examples):
    """The examples of one run.

    Training batches have, for h and w of `config.image_size`, M of `data.max_instances` and m of
    `data.mask_side`:

    | array           | dtype, shape         |                                                             |
    |-----------------|----------------------|-------------------------------------------------------------|
    | image           | uint8 [b, h, w, C]   | padded with 0 at bottom and right                           |
    | image_size      | int32 [b, 2]         | height and width without padding                            |
    | boxes           | float32 [b, M, 4]    | y0, x0, y1, x1 in pixels; 0 beyond the objects              |
    | classes         | int32 [b, M]         | indices into `class_names`                                  |
    | masks           | uint8 [b, M, m, m]   | 0 or 1: each object's, cropped to its box and resampled     |
    | instances_valid | bool [b, M]          | true for objects                                            |

    Validation batches have "image", on a canvas in which every image fits, "image_size", and on the host
    "id", int64 [b], "original_size" and "image_size", int32 [b, 2].
    """

    def __init__(self, config: Any):
        """Opens both splits of `config.data`; see `open_source` for errors.

        Leaves out training images without any annotation or with a side below 32 pixels.

        Args:
          config: the config of the run. Read here: `seed`, `batch_size` (global), `image_size`,
            `model.in_chans` (1 or 3), `model.patch_size`, and of `data` the keys of `add_detection_keys` and
            `source`, `root`, `flip`, `vflip`, `quarter_turns`, `augment`, `mean`,
            `unreadable` and `max_unreadable`.

        Raises:
          UserError: as `open_source`, `make_augmentation` and `faults.Tolerance`; the source has no objects;
            no training image is left; the splits have other classes; or a key is out of its range.
        """
        data, seed = config.data, config.seed
        low, high = _ratios(data.ratio_range)
        refuse_spec_augment(config)
        if data.val_source:
            raise UserError(
                f"data.val_source '{data.val_source}': detection takes its validation images from "
                "data.source; set it to ''"
            )
        image = _image_field(config)
        train, val = (open_source(data, split, seed) for split in ("train", "val"))
        objects, self.annotations = _annotations(train, data), _annotations(val, data)
        _check_classes(objects, self.annotations, data)
        kept = (objects.counts > 0) & (objects.sizes.min(axis=1) >= _LEAST_SIDE)
        if not kept.any():
            raise UserError(
                f"none of the {train.num_records} training images has objects and sides of {_LEAST_SIDE} "
                "pixels or more; check data.train_annotations"
            )
        _warn_of_many(objects, data.max_instances)
        instances = Instances(objects.class_names, data.max_instances, data.mask_side)
        fields = {"image": image, "instances": instances}
        train_transform = JitterTransform(
            fields,
            size=image_hw(config),
            ratios=(low, high),
            symmetries=Symmetries.of(config),
            augment=make_augmentation(data.augment, [round(255 * mean) for mean in data.mean], fields),
        )
        eval_fields = {"image": image, "id": val.fields["id"]}
        bounds = data.eval_long, data.eval_short
        stride = 8 * config.model.patch_size
        resized = sizes.fitted(tf.constant(self.annotations.sizes), *bounds).numpy()
        super().__init__(
            dataclasses.replace(train.only(kept), fields=fields),
            dataclasses.replace(val, fields=eval_fields),
            train_transform,
            DetectionEvalTransform(eval_fields, bounds, sizes.canvas(resized, stride)),
            seed,
            config.batch_size,
            faults.Tolerance(data.unreadable, data.max_unreadable),
        )


@dataclasses.dataclass(frozen=True)
class JitterTransform:
    """Random resizing over a wide range, a crop, mirroring and turning, photometric changes, padding.

    A crop without any box stays, as an example without objects. One that has boxes but no pixel of their
    objects is redrawn, up to REDRAWS times, where mmdetection takes another image.

    Attributes:
      fields: "image", an image, and "instances", objects with masks.
      size: height and width of crops; times a random ratio, the bounds of the resized image.
      ratios: least and greatest ratio.
      symmetries: in which examples are drawn.
      augment: applied to the image; None for no change.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    ratios: tuple[float, float]
    symmetries: Symmetries
    augment: Augmentation | None

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`."""
        crop_draws, symmetry_draws, _ = self._draws(seed)
        crop_draws = tf.reshape(crop_draws, [1 + REDRAWS, 3])
        image = self.fields["image"].decode(record["image"])
        instances = self.fields["instances"].decode(record["instances"])
        source = tf.shape(image)[:2]
        symmetry = self.symmetries.drawn(symmetry_draws)

        def geometry(attempt: tf.Tensor) -> Geometry:
            return self._geometry(source, crop_draws[attempt], symmetry)

        def lost(attempt: tf.Tensor, moved: Entries) -> tf.Tensor:
            boxes = geometry(attempt).boxes(instances["boxes"])
            inside = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=1)
            return tf.reduce_any(inside) & (tf.size(moved["classes"]) == 0)

        def redraw(attempt: tf.Tensor, moved: Entries) -> tf.Tensor:
            return (attempt < 0) | ((attempt < REDRAWS) & lost(attempt, moved))

        def moved_by(attempt: tf.Tensor, moved: Entries) -> tuple[tf.Tensor, Entries]:
            del moved
            return attempt + 1, self.fields["instances"].moved(instances, geometry(attempt + 1))

        start = tf.constant(-1), self._nothing()
        # The number of objects is not static.
        shapes = tf.nest.map_structure(lambda rows: tf.TensorShape([None, *rows.shape[1:]]), start[1])
        attempt, moved = tf.while_loop(redraw, moved_by, start, shape_invariants=(tf.TensorShape([]), shapes))
        return {"image": geometry(attempt).image(image), "instances": moved}

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`."""
        *_, augment_draws = self._draws(seed)

        def photometric(image: tf.Tensor) -> tf.Tensor:
            changed = self.augment.apply(image, augment_draws) if self.augment else image
            return tf.ensure_shape(changed, image.shape)

        changed = {name: field.changed(values[name], photometric) for name, field in self.fields.items()}
        return example_arrays(self.fields, changed, self.size)

    def _draws(self, seed: tf.Tensor) -> list[tf.Tensor]:
        parts = (3 * (1 + REDRAWS), self.symmetries.draws, self.augment.draws if self.augment else 0)
        return tf.split(tf.random.stateless_uniform([sum(parts)], seed), parts)

    def _geometry(self, source: tf.Tensor, draws: tf.Tensor, symmetry: Symmetry) -> Geometry:
        """Returns the step for three uniform draws: of the ratio, and of the crop's top and left."""
        low, high = self.ratios
        ratio = low + (high - low) * tf.cast(draws[0], tf.float64)
        # mmdetection truncates both bounds.
        bounds = (tf.cast(side * ratio, tf.int32) for side in (max(self.size), min(self.size)))
        resized = sizes.fitted(source, *bounds)
        margin = tf.maximum(resized - self.size, 0)
        offset = tf.minimum(tf.cast(draws[1:] * tf.cast(margin + 1, tf.float32), tf.int32), margin)
        return Geometry(
            source,
            resized,
            offset=offset,
            visible=tf.minimum(resized, self.size),
            **symmetry._asdict(),
            kernel=PLAIN_BILINEAR,
        )

    def _nothing(self) -> Entries:
        """Returns no objects, in the form that `Instances.moved` returns."""
        side = cast(Instances, self.fields["instances"]).mask_side
        return {
            "boxes": tf.zeros([0, 4]),
            "classes": tf.zeros([0], tf.int32),
            "masks": tf.zeros([0, side, side], tf.uint8),
        }


@dataclasses.dataclass(frozen=True)
class DetectionEvalTransform:
    """Whole images, resized and padded to one size.

    Attributes:
      fields: "image", an image, and "id", its number.
      bounds: of the longer and the shorter side.
      canvas: the height and width that images are padded to.
    """

    fields: Mapping[str, Field]
    bounds: tuple[int, int]
    canvas: Canvas

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`; depends on no seed."""
        del seed
        image = self.fields["image"].decode(record["image"])
        source = tf.shape(image)[:2]
        step = Geometry(source, sizes.fitted(source, *self.bounds), kernel=PLAIN_BILINEAR)
        return {"image": step.image(image), "id": record["id"], "original_size": source}

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`."""
        del seed
        arrays = example_arrays(self.fields, values, self.canvas)
        arrays[HOST] |= {"original_size": values["original_size"], "image_size": arrays["image_size"]}
        return arrays


def prediction_images(source: Source, config: Any) -> Iterator[PreparedImage]:
    """Yields the images of any source, resized as for evaluation; see `prepared_images`.

    Args:
      source: has a field "image".
      config: as for `DetectionData`; `data.source` and its companions are not read.

    Raises:
      UserError: a key is out of its range; or, from the iterator, an image cannot be read.
    """
    bounds = config.data.eval_long, config.data.eval_short
    return prepared_images(source, _image_field(config), (bounds,))


def _annotations(source: Source, data: Any) -> Annotations:
    if source.annotations is None:
        raise UserError(f"data.source '{data.source}' has no objects; detection takes coco or scenes")
    return source.annotations


def _check_classes(train: Annotations, val: Annotations, data: Any) -> None:
    of_train, of_val = (
        set(zip(each.category_ids.tolist(), each.class_names, strict=True)) for each in (train, val)
    )
    for number, name in sorted(of_train ^ of_val):
        key = "val_annotations" if (number, name) in of_train else "train_annotations"
        raise UserError(
            f"category {number} '{name}' is not in data.{key} '{data[key]}'; give both splits the same "
            "categories"
        )


def _warn_of_many(train: Annotations, most: int) -> None:
    many = np.count_nonzero(train.kept(~train.crowds).counts > most)
    if many:
        tqdm.write(
            f"warning: {many} training images have more than data.max_instances {most} objects; the "
            "largest of each are kept",
            file=sys.stderr,
        )


def _image_field(config: Any) -> Image:
    return Image().configured(config)


def _ratios(ratios: tuple[float, ...]) -> tuple[float, float]:
    if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
        raise UserError(f"data.ratio_range {tuple(ratios)} must be two positive numbers, smaller first")
    return ratios[0], ratios[1]
