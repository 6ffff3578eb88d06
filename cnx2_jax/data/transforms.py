"""From a stored record to an example: what training and evaluation do to images and the fields beside them.

Transforms are pure functions of (record, seed), in TensorFlow. Decoding, crops and the bicubic filter give
what the usual code of Pillow, torchvision and timm gives, rounded to uint8. Images are uint8 [height, width,
channels] throughout; normalisation happens on the accelerator, so hosts ship a quarter of the bytes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from cnx2_jax.data.augment import Augmentation
from cnx2_jax.data.crops import TRIES, eval_crop, random_crop_box
from cnx2_jax.data.erasing import erase, random_erasing_box
from cnx2_jax.data.fields import Arrays, Entries, Field, decode_moved, example_arrays
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.spectrograms import SpecAugment
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf


class Transform(Protocol):
    """Makes an example of a record, in two parts: only the first may fail."""

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """Decodes the stored entries and applies one geometry to all of them.

        Args:
          record: the stored entries, as `Source.read` returns them.
          seed: int64 [2]: the seed of the run, and the position of the example in the stream.

        Raises:
          tf.errors.OpError: when it runs, if an entry cannot be decoded.
        """

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """Applies photometric operations and pads.

        Args:
          values: from `decode`.
          seed: as for `decode`.

        Returns:
          The arrays of the example, each of static shape; those for the host under `types.HOST`.
        """


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, mirroring and turning, augmentation, random erasing, masks of spectrograms.

    Attributes:
      fields: of the example; "image" is an image and decides the geometry.
      size: height and width of the result.
      crop_scale: smallest and largest share of the area that a crop covers.
      crop_ratio: smallest and largest aspect ratio (width / height) of a crop.
      symmetries: in which examples are drawn.
      augment: applied to the image after the geometry; None for no augmentation.
      erasing: share of the images in which a box is replaced by noise.
      mean, std: of that noise in each channel, for uint8 as shares of 255; those that normalise images.
      spec_augment: masks of spectrograms; None for none.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    symmetries: Symmetries
    augment: Augmentation | None
    erasing: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spec_augment: SpecAugment | None = None

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`; of a JPEG only the crop is decoded, and damage below it goes unnoticed."""
        crop_draws, symmetry_draws, *_ = self._draws(seed)

        def draw(height: tf.Tensor, width: tf.Tensor) -> Geometry:
            box = random_crop_box(
                height, width, self.crop_scale, self.crop_ratio, tf.reshape(crop_draws, [4, TRIES])
            )
            symmetry = self.symmetries.drawn(symmetry_draws)
            return Geometry(tf.stack([height, width]), self.size, crop=box, **symmetry._asdict())

        return decode_moved(self.fields, record, draw, partly=True)

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`; augments, erases and masks images, [*size, channels]."""
        *_, augment_draws, erasing_draw, box_draws, mask_draws = self._draws(seed)

        def photometric(image: tf.Tensor) -> tf.Tensor:
            shape = image.shape
            if self.augment:
                image = self.augment.apply(image, augment_draws)
            if self.erasing:
                box = random_erasing_box(*self.size, tf.reshape(box_draws, [4, TRIES]))
                image = tf.cond(
                    (erasing_draw[0] <= self.erasing) & (box[2] > 0),
                    lambda: erase(tf.ensure_shape(image, shape), box, seed, self.mean, self.std),
                    lambda: image,
                )
            if self.spec_augment:
                image = self.spec_augment.apply(tf.ensure_shape(image, shape), mask_draws)
            return tf.ensure_shape(image, shape)

        changed = {name: field.changed(values[name], photometric) for name, field in self.fields.items()}
        return example_arrays(self.fields, changed)

    def _draws(self, seed: tf.Tensor) -> list[tf.Tensor]:
        # One call for all numbers, because each call costs as much as a small operation on an image.
        count = self.augment.draws if self.augment else 0
        masks = self.spec_augment.draws if self.spec_augment else 0
        parts = (4 * TRIES, self.symmetries.draws, count, 1, 4 * TRIES, masks)
        return tf.split(tf.random.stateless_uniform([sum(parts)], seed), parts)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The centre of an image or, from 384 px on, all of it warped: see `crops.eval_crop`.

    Attributes:
      fields: of the example; "image" is an image and decides the geometry.
      size: height and width of the result.
      crop_fraction: share of each side of the resized image that is kept.
    """

    fields: Mapping[str, Field]
    size: tuple[int, int]
    crop_fraction: float

    def decode(self, record: Entries, seed: tf.Tensor) -> Entries:
        """See `Transform`; depends on no seed."""
        del seed

        def draw(height: tf.Tensor, width: tf.Tensor) -> Geometry:
            return eval_crop(height, width, self.size, self.crop_fraction)

        return decode_moved(self.fields, record, draw)

    def finish(self, values: Entries, seed: tf.Tensor) -> Arrays:
        """See `Transform`."""
        del seed
        return example_arrays(self.fields, values)
