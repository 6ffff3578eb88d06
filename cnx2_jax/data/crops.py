"""Which part of an image an example shows: the random resized crop of training, the centre of evaluation."""

import math

from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.tensorflow import tf

TRIES = 10

# From this size on, evaluation images are warped to the target instead of cropped (recipes of the ConvNeXt
# papers at 384 px and above).
_WARP_FROM = 384


def random_crop_box(
    height: tf.Tensor,
    width: tf.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: tf.Tensor,
) -> tf.Tensor:
    """Draws the box of a random resized crop with the semantics of torchvision and timm.

    Each of ten tries has an area uniform in `scale` and an aspect ratio (width / height) log-uniform in
    `ratio`. The first one that fits is placed uniformly. If none fits, the box is the largest centred one
    whose aspect ratio lies in `ratio`.

    Args:
      height, width: of the image, scalar int32.
      scale: smallest and largest area, as a share of the area of the image.
      ratio: smallest and largest aspect ratio.
      draws: float32 [4, TRIES], uniform in [0, 1).

    Returns:
      int32 [4]: top, left, height, width.
    """
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    tries = random_boxes(image_height, image_width, scale, ratio, draws)
    _, _, heights, widths = tf.unstack(tries)
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)

    whole_width = tf.minimum(image_width, tf.maximum(1.0, tf.round(image_height * ratio[1])))
    whole_height = tf.minimum(image_height, tf.maximum(1.0, tf.round(image_width / ratio[0])))
    whole_top = tf.floor((image_height - whole_height) / 2)
    whole_left = tf.floor((image_width - whole_width) / 2)

    whole = tf.stack([whole_top, whole_left, whole_height, whole_width])
    first = tf.argmax(fits)  # argmax of booleans: the first that is true, or 0.
    return tf.cast(tf.where(fits[first], tries[:, first], whole), tf.int32)


def random_boxes(height, width, scale, ratio, draws) -> tf.Tensor:
    """Returns tops, lefts, heights and widths of boxes of random area, aspect ratio and place.

    Args:
      height, width: of the image, floats.
      scale, ratio, draws: see `random_crop_box`.

    Returns:
      float32 [4, TRIES], whole numbers. Boxes may be larger than the image.
    """
    area_draw, ratio_draw, top_draw, left_draw = tf.unstack(draws)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (scale[0] + (scale[1] - scale[0]) * area_draw) * height * width
    aspect = tf.exp(low + (high - low) * ratio_draw)
    widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    tops = tf.floor(top_draw * (height - heights + 1))
    lefts = tf.floor(left_draw * (width - widths + 1))
    return tf.stack([tops, lefts, heights, widths])


def eval_crop(height: tf.Tensor, width: tf.Tensor, size: tuple[int, int], crop_fraction: float) -> Geometry:
    """Returns the geometry of an evaluation image.

    Below 384 px the image is resized, keeping its aspect ratio, until it just covers `size / crop_fraction`,
    and the centre is cut out. From 384 px on the whole image is warped to `size`.

    Args:
      height, width: of the image, scalar int32.
      size: height and width of the result.
      crop_fraction: in (0, 1].
    """
    source = tf.stack([height, width])
    if max(size) >= _WARP_FROM:
        return Geometry(source, size)
    covered_height, covered_width = (math.floor(side / crop_fraction) for side in size)
    height, width = tf.cast(height, tf.int64), tf.cast(width, tf.int64)
    resized = tf.cond(
        height * covered_width <= width * covered_height,
        lambda: tf.stack([covered_height, covered_height * width // height]),
        lambda: tf.stack([covered_width * height // width, covered_width]),
    )
    # Rounds halves to even, as torchvision's centre crop does.
    offset = tf.cast(tf.round((resized - tf.constant(size, tf.int64)) / 2), tf.int32)
    return Geometry(source, tf.cast(resized, tf.int32), offset=offset, visible=size)
