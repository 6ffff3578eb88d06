"""The operations of RandAugment and of colour jitter, in TensorFlow, equal to Pillow's.

Each function names the Pillow call that it equals. All take and return uint8 [height, width, C], where C is
statically 1 or 3. Scalars are Python numbers or scalar tensors.

In TensorFlow an operation costs a few microseconds, each gathered slice a few nanoseconds however short it
is, and a broadcast along a last axis of 3 a lot. So these functions use arithmetic instead of tables, and
rows of width x C values.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from cnx2_jax.data.tensorflow import tf

Scalar: TypeAlias = tf.Tensor | float

# ITU-R 601 luma in Pillow's 16-bit fixed point. Sums take at most 24 bits, so float32 is exact.
_LUMA = (19595 / 2**16, 38470 / 2**16, 7471 / 2**16)

# The cubic convolution (a = -1) that Pillow's transforms use: the weight of tap t at the fraction d is
# sum of _CUBIC[p, t] * d**p.
_CUBIC = np.array([[0, 1, 0, 0], [-1, 0, 1, 0], [2, -2, 1, -1], [-1, 1, -1, 1]], np.float32)
# Pillow truncates fractions. In float32 a whole number may come out a little too small.
_WHOLE = 2.0**-12


def to_gray(image: tf.Tensor) -> tf.Tensor:
    """Returns the luma of uint8 [h, w, C] as uint8 [h, w, 1], as `convert("L")` does."""
    if _channels(image) == 1:
        return image
    weighted = [
        tf.cast(plane, tf.float32) * weight
        for plane, weight in zip(tf.unstack(image, axis=-1), _LUMA, strict=True)
    ]
    return tf.cast(tf.add_n(weighted) + 0.5, tf.uint8)[..., None]


def invert(image: tf.Tensor) -> tf.Tensor:
    """Turns every value v into 255 - v, as `ImageOps.invert` does."""
    return tf.bitwise.invert(image)


def posterize(image: tf.Tensor, bits: Scalar) -> tf.Tensor:
    """Keeps the upper `bits` bits (integer, 0 to 8) of every value, as `ImageOps.posterize` does."""
    mask = 256 - tf.bitwise.left_shift(1, 8 - _scalar(bits, tf.int32))
    return tf.bitwise.bitwise_and(image, tf.cast(mask, tf.uint8))


def solarize(image: tf.Tensor, threshold: Scalar) -> tf.Tensor:
    """Inverts the values from `threshold` (integer) up, as `ImageOps.solarize` does."""
    threshold = _scalar(threshold, tf.int32)
    # A threshold of 256 is out of the range of uint8. A select would cost several times this arithmetic.
    flipped = tf.cast(tf.where(threshold > 255, 0, 255), tf.uint8)
    reached = image >= tf.cast(tf.clip_by_value(threshold, 0, 255), tf.uint8)
    return tf.bitwise.bitwise_xor(image, tf.cast(reached, tf.uint8) * flipped)


def solarize_add(image: tf.Tensor, add: Scalar) -> tf.Tensor:
    """Adds `add` (integer, 0 to 128) to the values below 128, as timm's `solarize_add` does."""
    return image + tf.cast(image < 128, tf.uint8) * tf.cast(_scalar(add, tf.int32), tf.uint8)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel's range to 0..255, as `ImageOps.autocontrast` does.

    A channel of a single value is left unchanged.
    """
    planes = tf.unstack(image, axis=-1)
    low = tf.cast(tf.stack([tf.reduce_min(plane) for plane in planes]), tf.float64)
    high = tf.cast(tf.stack([tf.reduce_max(plane) for plane in planes]), tf.float64)
    flat = low >= high
    scale = tf.where(flat, tf.ones_like(low), 255 / (high - low))
    offset = tf.where(flat, tf.zeros_like(low), -low * scale)
    levels = tf.range(256, dtype=tf.float64)[:, None]
    table = tf.cast(tf.clip_by_value(levels * scale + offset, 0, 255), tf.uint8)

    # If the exact result is a whole number, Pillow's doubles fall on either side of it. Arithmetic in
    # float32, nudged to the side on which white fell, gives Pillow's table in nearly all cases.
    white = tf.gather(tf.transpose(table), tf.cast(high, tf.int32), batch_dims=1)
    nudge = tf.where(flat | (white == 255), _WHOLE, -_WHOLE)
    scale, offset = tf.cast(scale, tf.float32), tf.cast(offset, tf.float32) + nudge
    used = (levels >= low) & (levels <= high)
    approximate = _to_uint8(tf.cast(levels, tf.float32) * scale + offset)
    equal = tf.reduce_all((approximate == table) | ~used)

    def stretch() -> tf.Tensor:
        rows = tf.cast(_rows(image), tf.float32)
        width = tf.shape(image)[1]
        return tf.reshape(
            _to_uint8(rows * tf.tile(scale, [width]) + tf.tile(offset, [width])), tf.shape(image)
        )

    return tf.ensure_shape(
        tf.cond(equal, stretch, lambda: _look_up(table, _table_indices(image), image)), image.shape
    )


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Spreads each channel's values evenly over 0..255, as `ImageOps.equalize` does."""
    channels = _channels(image)
    indices = _table_indices(image)
    counts = tf.math.bincount(tf.reshape(indices, [-1]), minlength=256 * channels, maxlength=256 * channels)
    counts = tf.reshape(counts, [256, channels])
    last = tf.shape(image)[0] * tf.shape(image)[1]
    below = tf.cumsum(counts, exclusive=True)
    # Pillow leaves out the pixels of the last value that occurs, so this is the largest count below a value.
    step = tf.reduce_max(tf.where(below < last, below, 0), axis=0) // 255
    spread = tf.minimum((step // 2 + below) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, spread, tf.range(256)[:, None])
    return _look_up(tf.cast(table, tf.uint8), indices, image)


def color(image: tf.Tensor, factor: Scalar) -> tf.Tensor:
    """Moves from grey (0) to the image (1) and beyond, as `ImageEnhance.Color(image).enhance` does."""
    if _channels(image) == 1:
        return image
    values = tf.reshape(tf.cast(image, tf.float32), [-1, 3])
    luma = tf.matmul(values, tf.tile(tf.constant(_LUMA)[:, None], [1, 3]))
    gray = tf.floor(luma + 0.5)
    return tf.reshape(_blend(gray, values, factor), tf.shape(image))


def contrast(image: tf.Tensor, factor: Scalar) -> tf.Tensor:
    """Moves from the mean grey (0) to the image (1) and beyond, as `ImageEnhance.Contrast` does."""
    total = tf.reduce_sum(tf.cast(to_gray(image), tf.int32))
    count = tf.cast(tf.shape(image)[0] * tf.shape(image)[1], tf.float64)
    mean = tf.floor(tf.cast(total, tf.float64) / count + 0.5)
    return _blend(tf.cast(mean, tf.float32), tf.cast(image, tf.float32), factor)


def brightness(image: tf.Tensor, factor: Scalar) -> tf.Tensor:
    """Moves from black (0) to the image (1) and beyond, as `ImageEnhance.Brightness` does."""
    return _to_uint8(tf.cast(image, tf.float32) * _scalar(factor, tf.float32))


def sharpness(image: tf.Tensor, factor: Scalar) -> tf.Tensor:
    """Moves from the smoothed image (0) to the image (1) and beyond, as `ImageEnhance.Sharpness` does.

    The outermost pixels are left unchanged.
    """
    step = _channels(image)
    rows = _rows(image)
    values = tf.cast(rows, tf.float32)
    total = values[:-2] + values[1:-1] + values[2:]
    total = total[:, : -2 * step] + total[:, step:-step] + total[:, 2 * step :]
    values = values[1:-1, step:-step]
    # Ties cannot occur: 13 is odd.
    smooth = tf.floor((total + 4 * values) * (1 / 13) + 0.5)
    inner = rows[1:-1]
    # If the image is one pixel wide, its only column must not appear twice.
    inner = tf.concat([inner[:, :step], _blend(smooth, values, factor), inner[:, step:][:, -step:]], axis=1)
    return tf.reshape(tf.concat([rows[:1], inner, rows[1:][-1:]], axis=0), tf.shape(image))


def translate_x(image: tf.Tensor, share: Scalar, fill: Sequence[int]) -> tf.Tensor:
    """Moves the image left by `share` of its width, bicubic, as timm's `translate_x_rel` does.

    Args:
      image: uint8 [h, w, C].
      share: of the width; negative values move it right.
      fill: the colour, C values, of uncovered pixels.

    Returns:
      uint8 [h, w, C]: equals `Image.transform` with AFFINE (1, 0, share * w, 0, 1, 0), rarely one level off.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    pixels = _scalar(share, tf.float64) * tf.cast(width, tf.float64)
    return _slide(image, tf.fill([height], pixels), fill)


def translate_y(image: tf.Tensor, share: Scalar, fill: Sequence[int]) -> tf.Tensor:
    """Moves the image up by `share` of its height; see `translate_x`."""
    return _turned(translate_x, image, share, fill)


def shear_x(image: tf.Tensor, factor: Scalar, fill: Sequence[int]) -> tf.Tensor:
    """Moves each row left by `factor` times its distance from the top, bicubic, as timm's `shear_x` does.

    Args:
      image: uint8 [h, w, C].
      factor: negative values move them right.
      fill: the colour, C values, of uncovered pixels.

    Returns:
      uint8 [h, w, C]: equals `Image.transform` with AFFINE (1, factor, 0, 0, 1, 0), rarely one level off.
    """
    return _slide(image, _scalar(factor, tf.float64) * _centres(tf.shape(image)[0]), fill)


def shear_y(image: tf.Tensor, factor: Scalar, fill: Sequence[int]) -> tf.Tensor:
    """Moves each column up by `factor` times its distance from the left; see `shear_x`."""
    return _turned(shear_x, image, factor, fill)


def rotate(image: tf.Tensor, degrees: Scalar, fill: Sequence[int]) -> tf.Tensor:
    """Turns the image counter-clockwise around its centre, bicubic, as `Image.rotate` does.

    Args:
      image: uint8 [h, w, C].
      degrees: any angle.
      fill: the colour, C values, of uncovered pixels.

    Returns:
      uint8 [h, w, C]: equals `Image.rotate(degrees, BICUBIC, fillcolor=fill)`, rarely one level off.
    """
    channels = _channels(image)
    height, width = tf.unstack(tf.shape(image)[:2])
    inside, (left, across), (top, down) = _rotated_grid(height, width, _scalar(degrees, tf.float64))

    # Two repeated pixels on each side, because taps reach beyond the edges, then four rows of `fill` for
    # uncovered pixels to read. One slice holds four taps: phase p of the table has the slices that start at
    # the pixels p, p + 4, p + 8, ...
    quads = (width + 7) // 4
    padded = tf.concat([image[:1], image[:1], image, image[-1:], image[-1:]], axis=0)
    padded = tf.concat(
        [padded[:, :1], padded[:, :1], padded, tf.repeat(padded[:, -1:], 4 * quads - width - 2, axis=1)],
        axis=1,
    )
    filling = tf.tile(tf.constant([fill], tf.uint8), [4 * 4 * quads + 4, 1])
    pixels = tf.concat([tf.reshape(padded, [-1]), tf.reshape(filling, [-1])], axis=0)
    slices = (height + 8) * quads
    length = 4 * channels
    table = tf.concat(
        [tf.reshape(pixels[phase * channels :][: slices * length], [-1, length]) for phase in range(4)],
        axis=0,
    )
    start = (top + 1) * (4 * quads) + left + 1
    start = tf.where(inside, start, (height + 4) * (4 * quads))
    start = tf.bitwise.bitwise_and(start, 3) * slices + tf.bitwise.right_shift(start, 2)

    # Matrix products make the weights and sum the taps, because broadcasts of 3 or 12 values are slow.
    along = np.repeat(_CUBIC, channels, axis=1)
    powers = [
        tf.stack([tf.ones_like(part), part, part * part, part * part * part]) for part in (across, down)
    ]
    total = tf.matmul(powers[0], along, transpose_a=True) * tf.add_n(
        [
            tf.cast(tf.gather(table, start + tap * quads), tf.float32)
            * tf.matmul(powers[1], np.repeat(_CUBIC[:, tap : tap + 1], length, axis=1), transpose_a=True)
            for tap in range(4)
        ]
    )
    taps = np.tile(np.eye(channels, dtype=np.float32), [4, 1])
    return tf.reshape(_to_uint8(tf.matmul(total, taps) + _WHOLE), tf.shape(image))


def _rotated_grid(height: tf.Tensor, width: tf.Tensor, degrees: tf.Tensor):
    """Returns where the pixels of a rotated image come from, row by row.

    Returns:
      inside: bool [height * width]: whether the place is within the image.
      (column, fraction), (row, fraction): int32 and float32 [height * width]: the centre of a pixel to
        the left of and above the place, and the place's distance from it.
    """
    angle = -tf.math.floormod(degrees, 360) * (np.pi / 180)
    # Rounded to 15 digits as in Pillow. TensorFlow would turn a division by a constant into a product.
    cosine, sine = (
        tf.math.divide_no_nan(tf.round(function(angle) * 1e15), 1e15) for function in (tf.cos, tf.sin)
    )
    sizes = [tf.cast(side, tf.float64) for side in (width, height)]
    middle_x, middle_y = (size / 2 for size in sizes)
    across, down = _centres(width), _centres(height)[:, None]
    # In float64 and in Pillow's order, which decides on which side of an edge a place falls. TensorFlow
    # reorders sums of three terms, but not differences.
    places = [
        (cosine * across + sine * down) - (cosine * middle_x + sine * middle_y - middle_x),
        (cosine * down - sine * across) - (cosine * middle_y - sine * middle_x - middle_y),
    ]
    inside = tf.constant(True)
    parts = []
    for place, size in zip(places, sizes, strict=True):
        place = tf.reshape(place, [-1])
        inside &= (place >= 0) & (place < size)
        whole = tf.floor(place - 0.5)
        parts.append((tf.cast(whole, tf.int32), tf.cast(place - 0.5 - whole, tf.float32)))
    return inside, *parts


def _slide(image: tf.Tensor, pixels: tf.Tensor, fill: Sequence[int]) -> tf.Tensor:
    """Moves each row of uint8 [h, w, C] left by its number of pixels (float64 [h]), bicubic.

    Interpolates between all neighbours first, with one set of weights per row, and then moves whole pixels.
    """
    channels = _channels(image)
    height, width = tf.unstack(tf.shape(image)[:2])
    size = tf.cast(width, tf.float64)
    whole = tf.floor(pixels)
    fraction = tf.cast(pixels - whole, tf.float32)[:, None]
    powers = [tf.ones_like(fraction), fraction, fraction * fraction, fraction * fraction * fraction]
    weights = tf.unstack(tf.matmul(tf.concat(powers, axis=1), _CUBIC)[..., None], axis=1)
    padded = tf.concat([image[:, :1], image[:, :1], image, image[:, -1:], image[:, -1:]], axis=1)
    padded = tf.cast(_rows(padded), tf.float32)
    between = tf.add_n(
        [
            padded[:, tap * channels : (width + 1 + tap) * channels] * weight
            for tap, weight in enumerate(weights)
        ]
    )
    between = tf.reshape(_to_uint8(between + _WHOLE), [height, -1, channels])

    # Half a pixel beyond the first and last centres is still inside.
    filling = tf.broadcast_to(tf.constant(fill, tf.uint8), [height, 1, channels])
    first_inside = -0.5 - whole + pixels >= 0
    last_inside = size - 0.5 - whole + pixels < size
    table = tf.concat(
        [
            filling,
            tf.where(first_inside[:, None, None], between[:, :1], filling),
            between[:, 1:-1],
            tf.where(last_inside[:, None, None], between[:, -1:], filling),
            filling,
        ],
        axis=1,
    )
    start = tf.cast(tf.clip_by_value(whole, -size - 1, size), tf.int32)[:, None]
    columns = tf.clip_by_value(start + tf.range(width), -2, width) + 2
    indices = tf.range(height)[:, None] * (width + 3) + columns
    return tf.ensure_shape(tf.gather(tf.reshape(table, [-1, channels]), indices), image.shape)


def _turned(operation, image: tf.Tensor, *arguments) -> tf.Tensor:
    """Applies `operation`, which works on rows, to columns."""
    return tf.transpose(operation(tf.transpose(image, [1, 0, 2]), *arguments), [1, 0, 2])


def _blend(start: tf.Tensor, end: tf.Tensor, factor: Scalar) -> tf.Tensor:
    # In the order of Pillow's C code, because each step rounds.
    return _to_uint8(start + _scalar(factor, tf.float32) * (end - start))


def _to_uint8(values: tf.Tensor) -> tf.Tensor:
    """Clips to 0..255 and truncates the fraction."""
    return tf.cast(tf.clip_by_value(values, 0, 255), tf.uint8)


def _table_indices(image: tf.Tensor) -> tf.Tensor:
    """Returns where each value is in a flattened table [256, C]; int32 [h, w * C]."""
    channels = _channels(image)
    rows = tf.cast(_rows(image), tf.int32) * channels
    return rows + tf.tile(tf.range(channels), [tf.shape(image)[1]])


def _look_up(table: tf.Tensor, indices: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    # gather_nd is faster than gather for single values.
    return tf.reshape(tf.gather_nd(tf.reshape(table, [-1]), indices[..., None]), tf.shape(image))


def _rows(image: tf.Tensor) -> tf.Tensor:
    shape = tf.shape(image)
    return tf.reshape(image, [shape[0], shape[1] * shape[2]])


def _centres(count: tf.Tensor) -> tf.Tensor:
    return tf.range(tf.cast(count, tf.float64), dtype=tf.float64) + 0.5


def _channels(image: tf.Tensor) -> int:
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"an image must have 1 or 3 channels, known before the graph runs, not {channels}")
    return channels


def _scalar(value: Scalar, dtype: tf.DType) -> tf.Tensor:
    # A cast would turn a Python number into float32 first.
    return tf.cast(value, dtype) if tf.is_tensor(value) else tf.constant(value, dtype)
