"""What happens to one image: pure functions of (encoded bytes, seed), in TensorFlow.

They give what the usual Pillow, torchvision and timm code gives: the same decoding, crops and bicubic
filter, rounded to uint8. Images are uint8 [height, width, channels] throughout; normalising happens on
the accelerator, so that hosts ship a quarter of the bytes.
"""

import dataclasses
import math

from cnx2_jax.data.augment import Augmentation
from cnx2_jax.data.decoding import decode, decode_crop
from cnx2_jax.data.resizing import resize
from cnx2_jax.data.tensorflow import tf

# From this size up an evaluation image is warped to the target instead of cropped (recipes of the
# ConvNeXt papers at 384 px and above).
_WARP_FROM = 384
_TRIES = 10
# timm's RandomErasing: share of the area, and aspect ratio, of the box.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, mirroring, augmentation, random erasing: an image from bytes and a seed.

    Attributes:
      size: of the result.
      channels: 1 or 3.
      crop_scale: smallest and largest share of the area that a crop covers.
      crop_ratio: its smallest and largest width over height.
      flip: whether half of the images are mirrored.
      augment: what is done besides, or None.
      erasing: share of the images in which a box is replaced by noise.
      mean, std: of that noise in each channel, as shares of the full range; what normalises images.
    """

    size: tuple[int, int]
    channels: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    augment: Augmentation | None
    erasing: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Maps a scalar string and int64 [2] to uint8 [*size, channels]."""
        return self.change(self.crop(encoded, seed), seed)

    def crop(self, encoded: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The part that fails on what is no image: decodes, crops, resizes and mirrors."""
        crop_draws, flip_draw, *_ = self._draws(seed)
        image = decode_crop(
            encoded,
            self.channels,
            lambda height, width: random_crop_box(
                height, width, self.crop_scale, self.crop_ratio, tf.reshape(crop_draws, [4, _TRIES])
            ),
        )
        image = resize(image, self.size, mirrored=(flip_draw[0] < 0.5) if self.flip else False)
        return tf.ensure_shape(image, [*self.size, self.channels])

    def change(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The part after it: augments and erases uint8 [*size, channels]."""
        *_, augment_draws, erasing_draw, box_draws = self._draws(seed)
        if self.augment:
            image = self.augment.apply(image, augment_draws)
        if self.erasing:
            box = random_erasing_box(*self.size, tf.reshape(box_draws, [4, _TRIES]))
            image = tf.cond(
                (erasing_draw[0] <= self.erasing) & (box[2] > 0),
                lambda: self._erase(image, box, seed),
                lambda: image,
            )
        return tf.ensure_shape(image, [*self.size, self.channels])

    def _draws(self, seed: tf.Tensor) -> list[tf.Tensor]:
        # One call for all numbers: each costs as much as a small operation on an image.
        count = self.augment.draws if self.augment else 0
        parts = (4 * _TRIES, 1, count, 1, 4 * _TRIES)
        return tf.split(tf.random.stateless_uniform([sum(parts)], seed), parts)

    def _erase(self, image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Replaces a box by noise that is standard normal once the image is normalised (timm's pixel mode).

        Of what 8 bits hold, that is: about a 50th of the values are cut off on either side.
        """
        top, left, height, width = tf.unstack(box)
        rows, columns = self.size
        # In rows of width x channels, as broadcasting along a last axis of 3 is slow.
        noise = tf.random.stateless_normal([height, width * self.channels], _other_stream(seed))
        scale, shift = (
            tf.tile(tf.constant([255 * x for x in each]), [width]) for each in (self.std, self.mean)
        )
        noise = tf.cast(tf.clip_by_value(noise * scale + (shift + 0.5), 0.0, 255.0), tf.uint8)
        right = (columns - left - width) * self.channels
        around = [[top, rows - top - height], [left * self.channels, right]]
        flat = tf.reshape(image, [rows, columns * self.channels])
        outside = tf.pad(tf.zeros_like(noise, tf.bool), around, constant_values=True)
        return tf.reshape(tf.where(outside, flat, tf.pad(noise, around)), image.shape)


def _other_stream(seed: tf.Tensor) -> tf.Tensor:
    """A seed whose numbers have nothing to do with those of `seed`; positions are never negative."""
    return tf.bitwise.invert(seed)


def random_crop_box(
    height: tf.Tensor,
    width: tf.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: tf.Tensor,
) -> tf.Tensor:
    """Draws the box of a random resized crop with torchvision's and timm's semantics.

    Of ten tries with area uniform in `scale` and aspect ratio (width / height) log-uniform in
    `ratio`, the first that fits is placed uniformly. If none fits: the largest centred box whose
    ratio lies in `ratio`.

    Args:
      height, width: of the image, scalar int32.
      scale: smallest and largest area, as a share of the image's.
      ratio: smallest and largest aspect ratio.
      draws: float32 [4, tries], uniform in [0, 1).

    Returns:
      int32 [4]: top, left, height, width.
    """
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    tries = _boxes(image_height, image_width, scale, ratio, draws)
    _, _, heights, widths = tf.unstack(tries)
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)

    whole_width = tf.minimum(image_width, tf.maximum(1.0, tf.round(image_height * ratio[1])))
    whole_height = tf.minimum(image_height, tf.maximum(1.0, tf.round(image_width / ratio[0])))
    whole_top = tf.floor((image_height - whole_height) / 2)
    whole_left = tf.floor((image_width - whole_width) / 2)

    whole = tf.stack([whole_top, whole_left, whole_height, whole_width])
    first = tf.argmax(fits)  # argmax of booleans: the first that is true, or 0.
    return tf.cast(tf.where(fits[first], tries[:, first], whole), tf.int32)


def random_erasing_box(height: int, width: int, draws: tf.Tensor) -> tf.Tensor:
    """Draws the box that random erasing covers (timm.data.random_erasing).

    Of ten tries with area uniform from 2% to a third of the image's and aspect ratio log-uniform from 0.3 to
    1 / 0.3, the first that is smaller than the image both ways, placed uniformly.

    Args:
      height, width: of the image.
      draws: float32 [4, tries], uniform in [0, 1).

    Returns:
      int32 [4]: top, left, height, width; all 0 if no try fits.
    """
    tries = _boxes(float(height), float(width), _ERASED_AREA, _ERASED_RATIO, draws)
    _, _, heights, widths = tf.unstack(tries)
    fits = (heights < height) & (widths < width)
    first = tf.argmax(fits)
    return tf.cast(tf.where(fits[first], tries[:, first], 0.0), tf.int32)


def _boxes(height, width, scale, ratio, draws) -> tf.Tensor:
    """Tops, lefts, heights and widths of boxes of random area, aspect ratio and place, [4, tries]."""
    area_draw, ratio_draw, top_draw, left_draw = tf.unstack(draws)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (scale[0] + (scale[1] - scale[0]) * area_draw) * height * width
    aspect = tf.exp(low + (high - low) * ratio_draw)
    widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    tops = tf.floor(top_draw * (height - heights + 1))
    lefts = tf.floor(left_draw * (width - widths + 1))
    return tf.stack([tops, lefts, heights, widths])


def eval_image(
    encoded: tf.Tensor, *, size: tuple[int, int], channels: int, crop_fraction: float
) -> tf.Tensor:
    """Turns an encoded image (scalar string) into uint8 [*size, channels], without chance.

    Below 384 px the image is shrunk, its shape kept, until it just covers `size / crop_fraction`,
    and the centre is cut out; from 384 px up all of it is warped to `size`.
    """
    image = decode(encoded, channels)
    if max(size) >= _WARP_FROM:
        return tf.ensure_shape(resize(image, size), [*size, channels])
    covered_height, covered_width = (math.floor(side / crop_fraction) for side in size)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.int64))
    resized = tf.cond(
        height * covered_width <= width * covered_height,
        lambda: tf.stack([covered_height, covered_height * width // height]),
        lambda: tf.stack([covered_width * height // width, covered_width]),
    )
    # Rounds halves to even, as torchvision's centre crop does.
    offset = tf.round((resized - tf.constant(size, tf.int64)) / 2)
    window = tf.concat([tf.cast(offset, tf.int32), tf.constant(size)], axis=0)
    image = resize(image, tf.cast(resized, tf.int32), window=window)
    return tf.ensure_shape(image, [*size, channels])
