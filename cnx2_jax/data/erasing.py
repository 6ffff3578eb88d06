"""Random erasing: a box of an image is replaced by noise."""

from cnx2_jax.data.crops import random_boxes
from cnx2_jax.data.resizing import to_dtype
from cnx2_jax.data.tensorflow import tf

# timm's RandomErasing: area of the box as a share of the image, and its aspect ratio.
_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)


def random_erasing_box(height: int, width: int, draws: tf.Tensor) -> tf.Tensor:
    """Draws the box that random erasing covers (timm.data.random_erasing).

    Each of ten tries has an area uniform from 2% to a third of the image and an aspect ratio log-uniform from
    0.3 to 1 / 0.3. The first one that is smaller than the image in both directions is placed uniformly.

    Args:
      height, width: of the image.
      draws: float32 [4, TRIES], uniform in [0, 1).

    Returns:
      int32 [4]: top, left, height, width; all 0 if no try fits.
    """
    tries = random_boxes(float(height), float(width), _AREA, _RATIO, draws)
    _, _, heights, widths = tf.unstack(tries)
    fits = (heights < height) & (widths < width)
    first = tf.argmax(fits)
    return tf.cast(tf.where(fits[first], tries[:, first], 0.0), tf.int32)


def erase(
    image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tf.Tensor:
    """Replaces a box by noise that is standard normal once the image is normalised (timm's pixel mode).

    8 bits clip about a 50th of the values on either side.

    Args:
      image: [height, width, C], all known before the graph runs; uint8, uint16, int16, float16 or float32.
      box: int32 [4]: top, left, height, width.
      seed: int64 [2], of the example; the noise is independent of its other draws.
      mean, std: of the noise in each channel; for uint8 as shares of 255.

    Returns:
      [height, width, C], of the same dtype.
    """
    top, left, height, width = tf.unstack(box)
    rows, columns, channels = image.shape
    # In rows of width x channels, because broadcasting along a last axis of 3 is slow.
    noise = tf.random.stateless_normal([height, width * channels], _other_stream(seed))
    unit = 255 if image.dtype == tf.uint8 else 1
    scale, shift = (tf.tile(tf.constant([unit * x for x in each]), [width]) for each in (std, mean))
    if image.dtype == tf.uint8:
        noise = tf.cast(tf.clip_by_value(noise * scale + (shift + 0.5), 0.0, 255.0), tf.uint8)
    else:
        noise = to_dtype(noise * scale + shift, image.dtype)
    right = (columns - left - width) * channels
    around = [[top, rows - top - height], [left * channels, right]]
    flat = tf.reshape(image, [rows, columns * channels])
    outside = tf.pad(tf.zeros_like(noise, tf.bool), around, constant_values=True)
    return tf.reshape(tf.where(outside, flat, tf.pad(noise, around)), image.shape)


def _other_stream(seed: tf.Tensor) -> tf.Tensor:
    """Returns a seed that no example has, since positions are never negative."""
    return tf.bitwise.invert(seed)
