"""SpecAugment's masks (Park et al. 2019, arXiv 1904.08779): bars of time and of frequency become the mean.

Rows of a spectrogram are frequencies and its columns are time. The paper's time warp is left out: its
authors found it the most expensive and least influential of the three, the first to drop.
"""

import dataclasses
from typing import Any

from cnx2_jax.bands import BYTE_RANGE
from cnx2_jax.configuration import image_hw
from cnx2_jax.data.resizing import to_dtype
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

_PER_MASK = 2  # draws: of the width and of the place


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """How many masks an image gets, and how wide they may be.

    A mask is 0 to `width` pixels wide, and its place is uniform among those at which it lies inside. Masks
    may overlap. All bands of an image have the same ones.

    Attributes:
      time_masks: the number of masks that cover columns.
      time_width: the largest width of these, in pixels.
      frequency_masks: the number of masks that cover rows.
      frequency_width: the largest width of these, in pixels.
      fill: what each band has in a mask, in the unit of the image: its mean, so that it is 0 once normalised.
    """

    time_masks: int
    time_width: int
    frequency_masks: int
    frequency_width: int
    fill: tuple[float, ...]

    @property
    def draws(self) -> int:
        """How many random numbers an example takes."""
        return _PER_MASK * (self.time_masks + self.frequency_masks)

    def apply(self, image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Masks an image.

        Args:
          image: [h, w, C], all known before the graph runs; uint8, uint16, int16, float16 or float32.
          draws: float32 [draws], uniform in [0, 1).

        Returns:
          [h, w, C], of the same dtype.
        """
        height, width, _ = image.shape
        of_time, of_frequency = tf.split(
            tf.reshape(draws, [-1, _PER_MASK]), [self.time_masks, self.frequency_masks]
        )
        columns = _covered(width, self.time_width, of_time)
        rows = _covered(height, self.frequency_width, of_frequency)
        covered = rows[:, None] | columns
        return tf.where(covered[..., None], to_dtype(tf.constant(self.fill, tf.float32), image.dtype), image)


def make_spec_augment(config: Any) -> SpecAugment | None:
    """Returns the masks that a config asks for, None without any.

    Args:
      config: of the run; read are `image_size`, and of `data` `time_masks`, `time_mask_width`,
        `frequency_masks`, `frequency_mask_width`, `mean` and `dtype`.

    Raises:
      UserError: a mask could cover the whole image, or no pixel.
    """
    data, sides = config.data, image_hw(config)
    widths = []
    for axis, side in zip(("frequency", "time"), sides, strict=True):
        count, width = data[f"{axis}_masks"], data[f"{axis}_mask_width"]
        if count and not 0 < width < side:
            raise UserError(
                f"data.{axis}_mask_width {width} must be from 1 to {side - 1}, less than the image's {side} "
                f"pixels; or set data.{axis}_masks=0"
            )
        widths.append(width)
    if not data.time_masks and not data.frequency_masks:
        return None
    unit = BYTE_RANGE if data.dtype == "uint8" else 1
    fill = tuple(unit * float(mean) for mean in data.mean)
    return SpecAugment(data.time_masks, widths[1], data.frequency_masks, widths[0], fill)


def refuse_spec_augment(config: Any) -> None:
    """Raises UserError if a config asks for masks, for data whose maps or objects they would not cover."""
    for key in ("time_masks", "frequency_masks"):
        if config.data[key]:
            raise UserError(
                f"data.{key} {config.data[key]} masks spectrograms for pretraining, classification, "
                f"multi-label classification and regression, not for the task {config.task}; set data.{key}=0"
            )


def _covered(side: int, most: int, draws: tf.Tensor) -> tf.Tensor:
    """Returns which pixels of an axis are in a mask, bool [side].

    Args:
      side: pixels of the axis.
      most: the largest width of a mask.
      draws: float32 [masks, 2]: of widths and of places.
    """
    widths = tf.floor(draws[:, 0] * (most + 1))
    first = tf.floor(draws[:, 1] * (side - widths + 1))
    places = tf.range(side, dtype=tf.float32)[:, None]
    return tf.reduce_any((places >= first) & (places < first + widths), axis=1)
