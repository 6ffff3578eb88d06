"""Bicubic and bilinear resizing, as Pillow's or OpenCV's, in two small matrix products; nearest-neighbour."""

from collections.abc import Callable
from typing import NamedTuple

from cnx2_jax.data.tensorflow import tf


class Kernel(NamedTuple):
    """A filter of resizing.

    Attributes:
      radius: its reach in output pixels when shrinking, in input pixels when enlarging.
      weight: maps distances >= 0 to weights, elementwise.
      antialias: whether it widens when shrinking; if not, its reach is in input pixels always.
    """

    radius: float
    weight: Callable[[tf.Tensor], tf.Tensor]
    antialias: bool = True


def _cubic(x: tf.Tensor) -> tf.Tensor:
    """Keys' cubic kernel with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tf.where(x < 1, near, tf.where(x < 2.0, far, 0.0))


BICUBIC = Kernel(2.0, _cubic)
BILINEAR = Kernel(1.0, lambda x: tf.maximum(1 - x, 0.0))
# OpenCV's INTER_LINEAR, within a level.
PLAIN_BILINEAR = BILINEAR._replace(antialias=False)

# Outputs that share one dense block of weights: larger blocks multiply more zeros, smaller ones make
# more and slower products.
_BLOCK = 8
_NOWHERE = -1e9  # a distance that gives weight 0


def resize(
    image: tf.Tensor,
    size: tuple[int, int] | tf.Tensor,
    *,
    window: tf.Tensor | None = None,
    mirrored: tf.Tensor | bool = False,
    flipped: tf.Tensor | bool = False,
    kernel: Kernel = BICUBIC,
) -> tf.Tensor:
    """Resizes as Pillow's `Image.resize` does: along one axis, then the other.

    uint8 is rounded after each, as by Pillow; other integers at the end, and floats never. Results of the
    bicubic filter are clipped to the range of integers and to the finite numbers of float16.

    `tf.image.resize(antialias=True)` filters pixel by pixel. Here blocks of outputs are matrix products of
    weights with the inputs that they see, which takes a third of its time.

    Args:
      image: [h, w, C], uint8, uint16, int16, float16 or float32.
      size: height and width of the whole result.
      window: int32 [4]: top, left, height, width of the part to compute; all of the result if None.
      mirrored: scalar bool; whether to mirror the result left to right, at no cost.
      flipped: scalar bool; whether to mirror it top to bottom, at no cost.
      kernel: BICUBIC, BILINEAR or PLAIN_BILINEAR.

    Returns:
      [height, width, C] of the window, of the same dtype.
    """
    dtype = image.dtype
    if dtype != tf.uint8:
        image = tf.cast(image, tf.float32)
    shape, size = tf.shape(image), tf.convert_to_tensor(size, tf.int32)
    window = tf.concat([[0, 0], size], axis=0) if window is None else window
    indices, weights = _filters(shape[:2], size, window, tf.convert_to_tensor(mirrored), flipped, kernel)

    def rows(pixels: tf.Tensor) -> tf.Tensor:
        height, width, channels = tf.unstack(tf.shape(pixels))
        flat = tf.reshape(pixels, [height, width * channels])
        return tf.reshape(_filter(flat, indices[0], weights[0], window[2]), [window[2], width, channels])

    def columns(pixels: tf.Tensor) -> tf.Tensor:
        # Transposes a matrix of single values, which is twice as fast as transposing whole pixels.
        height, width, channels = tf.unstack(tf.shape(pixels))
        turned = tf.transpose(tf.reshape(pixels, [height, width * channels]))
        filtered = _filter(tf.reshape(turned, [width, channels * height]), indices[1], weights[1], window[3])
        turned = tf.transpose(tf.reshape(filtered, [window[3] * channels, height]))
        return tf.reshape(turned, [height, window[3], channels])

    # The order of the passes in Pillow 13; older versions always start with the columns.
    shrinking = shape[:2] - size
    rows_first = shrinking[0] > 2 * tf.maximum(shrinking[1], 0)
    result = tf.cond(rows_first, lambda: columns(rows(image)), lambda: rows(columns(image)))
    result.set_shape([None, None, image.shape[-1]])
    return to_dtype(result, dtype)


def to_dtype(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Rounds (halves to even) and clips to an integer dtype, clips to float16, or keeps the dtype it has."""
    if values.dtype == dtype:
        return values
    values = tf.round(values) if dtype.is_integer else values
    return tf.cast(tf.clip_by_value(values, float(dtype.min), float(dtype.max)), dtype)


def resize_nearest(
    values: tf.Tensor,
    size: tuple[int, int] | tf.Tensor,
    *,
    window: tf.Tensor | None = None,
    mirrored: tf.Tensor | bool = False,
    flipped: tf.Tensor | bool = False,
) -> tf.Tensor:
    """Gives each pixel of the result the value of the input pixel that its centre lies in.

    Args:
      values: [..., h, w], any type.
      size, window, mirrored, flipped: see `resize`.

    Returns:
      [..., height, width] of the window, of the same type.
    """
    rows, columns = nearest_places(
        tf.shape(values)[-2:], size, window=window, mirrored=mirrored, flipped=flipped
    )
    return tf.gather(tf.gather(values, rows, axis=-2), columns, axis=-1)


def nearest_places(
    inputs: tuple[int, int] | tf.Tensor,
    size: tuple[int, int] | tf.Tensor,
    *,
    window: tf.Tensor | None = None,
    mirrored: tf.Tensor | bool = False,
    flipped: tf.Tensor | bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the rows and the columns of the input that `resize_nearest` takes its result from.

    Args:
      inputs: height and width of the input.
      size, window, mirrored, flipped: see `resize`.

    Returns:
      int32 [height] and int32 [width] of the window.
    """
    inputs, size = tf.convert_to_tensor(inputs, tf.int32), tf.convert_to_tensor(size, tf.int32)
    window = tf.concat([[0, 0], size], axis=0) if window is None else window
    scale = tf.cast(inputs, tf.float64) / tf.cast(size, tf.float64)

    def nearest(axis: int, places: tf.Tensor) -> tf.Tensor:
        centres = (tf.cast(window[axis] + places, tf.float64) + 0.5) * scale[axis]
        return tf.minimum(tf.cast(centres, tf.int32), inputs[axis] - 1)

    columns = tf.range(window[3])
    columns = tf.where(mirrored, window[3] - 1 - columns, columns)
    rows = tf.range(window[2])
    rows = rows if flipped is False else tf.where(flipped, window[2] - 1 - rows, rows)
    return nearest(0, rows), nearest(1, columns)


def _filter(rows: tf.Tensor, indices: tf.Tensor, weights: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Filters uint8 or float32 [n, m] to [count, m] with what `_filters` returns for one axis."""
    inputs, others = tf.unstack(tf.shape(rows))
    seen = tf.cast(tf.gather(rows, tf.minimum(indices, inputs - 1)), tf.float32)
    filtered = tf.matmul(weights, seen)
    if rows.dtype == tf.uint8:
        # One operation that clips and rounds halves up: 256 levels from 0 to 255.
        filtered = tf.quantization.fake_quant_with_min_max_args(filtered, 0.0, 255.0)
    return tf.reshape(tf.cast(filtered, rows.dtype), [-1, others])[:count]


def _filters(
    inputs: tf.Tensor,
    size: tf.Tensor,
    window: tf.Tensor,
    mirrored: tf.Tensor,
    flipped: tf.Tensor | bool,
    kernel: Kernel,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns which inputs every block of outputs sees, and with which weights, for rows and for columns.

    Rows and columns share the operations, which are many and small.

    Returns:
      Indices, int32 [2, blocks, seen], which may be beyond the last input where weights are 0; weights,
      float32 [2, blocks, block, seen]. Outputs beyond the window fill the last block.
    """
    # Float64 as in Pillow.
    scale = tf.cast(inputs, tf.float64) / tf.cast(size, tf.float64)
    stretch = tf.maximum(scale, 1.0) if kernel.antialias else tf.ones_like(scale)
    reach = kernel.radius * stretch
    starts, counts = window[:2], window[2:]
    blocks = (tf.reduce_max(counts) + _BLOCK - 1) // _BLOCK
    places = tf.range(blocks * _BLOCK)
    across = tf.where(mirrored, counts[1] - 1 - places, places)
    down = places if flipped is False else tf.where(flipped, counts[0] - 1 - places, places)
    places = tf.reshape(tf.stack([down, across]) + starts[:, None], [2, blocks, _BLOCK])
    centres = (tf.cast(places, tf.float64) + 0.5) * scale[:, None, None]

    seen = tf.cast(tf.reduce_max(tf.math.ceil((_BLOCK - 1) * scale + 2 * reach)), tf.int32) + 1
    first = tf.cast(tf.floor(tf.reduce_min(centres, axis=2) - reach[:, None]), tf.int32)
    indices = first[:, :, None] + tf.range(seen)
    inside = (indices >= 0) & (indices < inputs[:, None, None])
    middles = tf.where(inside, tf.cast(indices, tf.float64) + 0.5, _NOWHERE)
    distances = middles[:, :, None] - centres[..., None]
    weights = kernel.weight(tf.abs(distances / stretch[:, None, None, None]))
    weights = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axis=3, keepdims=True))
    return tf.maximum(indices, 0), tf.cast(weights, tf.float32)
