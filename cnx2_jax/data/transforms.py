"""What happens to one image: pure functions of (encoded bytes, seed), in TensorFlow.

They give what the usual Pillow, torchvision and timm code gives: the same decoding, crops and bicubic
filter, rounded to uint8. Images are uint8 [height, width, channels] throughout; normalising happens on
the accelerator, so that hosts ship a quarter of the bytes.
"""

import math

import tensorflow as tf

# From this size up an evaluation image is warped to the target instead of cropped (recipes of the
# ConvNeXt papers at 384 px and above).
_WARP_FROM = 384
_CROP_TRIES = 10


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a JPEG, PNG or WebP image, told apart by its content, not by its name.

    Alpha is dropped and the first frame taken, as Pillow's `convert("RGB")` does; an animated WebP
    is refused. One channel comes out as Pillow's `convert("L")` computes it.

    Args:
      encoded: scalar string.
      channels: 1 or 3.

    Returns:
      uint8 [height, width, channels].

    Raises:
      tf.errors.OpError: when it runs, if the bytes are no image.
    """
    image = tf.case(
        [
            (tf.io.is_jpeg(encoded), lambda: _decode_jpeg(encoded)),
            (tf.strings.substr(encoded, 0, 4) == b"RIFF", lambda: _decode_webp(encoded)),
        ],
        default=lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    image.set_shape([None, None, 3])
    return image if channels == 3 else _to_gray(image)


def _decode_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    # TensorFlow's default is a fast, inexact inverse transform, off by up to 4 levels.
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_webp(encoded: tf.Tensor) -> tf.Tensor:
    # Only with channels=0 does TensorFlow 2.21 read WebP both with and without alpha; but that
    # overruns its buffer on an animation. With channels=3 an animation is a clean error. The flag is
    # bit 1 of the byte after the VP8X chunk's header.
    flags = tf.io.decode_raw(tf.strings.substr(encoded, 20, 1), tf.uint8)[0]
    extended = tf.strings.substr(encoded, 12, 4) == b"VP8X"
    return tf.cond(
        tf.logical_and(extended, tf.bitwise.bitwise_and(flags, tf.constant(2, tf.uint8)) > 0),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        lambda: tf.io.decode_image(encoded, channels=0, expand_animations=False)[..., :3],
    )


def _to_gray(image: tf.Tensor) -> tf.Tensor:
    # ITU-R 601 luma in Pillow's 16-bit fixed point; equal channels come out unchanged.
    weighted = tf.cast(image, tf.int32) * tf.constant([19595, 38470, 7471])
    return tf.cast((tf.reduce_sum(weighted, axis=-1, keepdims=True) + 0x8000) // 0x10000, tf.uint8)


def resize(image: tf.Tensor, size: tuple[int, int] | tf.Tensor) -> tf.Tensor:
    """Resizes uint8 [h, w, C] to uint8 [*size, C], bicubic and antialiased, as Pillow does."""
    resized = tf.image.resize(image, size, method="bicubic", antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def random_crop_box(
    height: tf.Tensor,
    width: tf.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: tf.Tensor,
) -> tf.Tensor:
    """Draws the box of a random resized crop with torchvision's and timm's semantics.

    Of ten tries with area uniform in `scale` and aspect ratio (width / height) log-uniform in
    `ratio`, the first that fits is placed uniformly. If none fits: the largest centred box whose
    ratio lies in `ratio`.

    Args:
      height, width: of the image, scalar int32.
      scale: smallest and largest area, as a share of the image's.
      ratio: smallest and largest aspect ratio.
      seed: int64 [2].

    Returns:
      int32 [4]: top, left, height, width.
    """
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area_draw, ratio_draw, top_draw, left_draw = tf.unstack(
        tf.random.stateless_uniform([4, _CROP_TRIES], seed)
    )
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (scale[0] + (scale[1] - scale[0]) * area_draw) * image_height * image_width
    aspect = tf.exp(low + (high - low) * ratio_draw)
    widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    tops = tf.floor(top_draw * (image_height - heights + 1))
    lefts = tf.floor(left_draw * (image_width - widths + 1))

    whole_width = tf.minimum(image_width, tf.maximum(1.0, tf.round(image_height * ratio[1])))
    whole_height = tf.minimum(image_height, tf.maximum(1.0, tf.round(image_width / ratio[0])))
    whole_top = tf.floor((image_height - whole_height) / 2)
    whole_left = tf.floor((image_width - whole_width) / 2)

    tries = tf.stack([tops, lefts, heights, widths], axis=-1)
    whole = tf.stack([whole_top, whole_left, whole_height, whole_width])
    first = tf.argmax(fits)  # argmax of booleans: the first that is true, or 0.
    return tf.cast(tf.where(fits[first], tries[first], whole), tf.int32)


def random_resized_crop(
    image: tf.Tensor,
    *,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: tf.Tensor,
) -> tf.Tensor:
    """Cuts `random_crop_box` out of uint8 [h, w, C] and resizes it to uint8 [*size, C]."""
    shape = tf.shape(image)
    top, left, height, width = tf.unstack(random_crop_box(shape[0], shape[1], scale, ratio, seed))
    return resize(image[top : top + height, left : left + width], size)


def random_flip(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors uint8 [h, w, C] left to right with probability one half."""
    flipped = tf.random.stateless_uniform([], seed) < 0.5
    return tf.cond(flipped, lambda: tf.reverse(image, axis=[1]), lambda: image)


def train_image(
    encoded: tf.Tensor,
    seed: tf.Tensor,
    *,
    size: tuple[int, int],
    channels: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: bool,
) -> tf.Tensor:
    """Turns an encoded image (scalar string) and a seed (int64 [2]) into uint8 [*size, channels]."""
    crop_seed, flip_seed = tf.unstack(tf.random.split(seed, 2))
    image = decode(encoded, channels)
    image = random_resized_crop(image, size=size, scale=crop_scale, ratio=crop_ratio, seed=crop_seed)
    if flip:
        image = random_flip(image, flip_seed)
    return tf.ensure_shape(image, [*size, channels])


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
    image = resize(image, tf.cast(resized, tf.int32))
    # Rounds halves to even, as torchvision's centre crop does.
    offset = tf.cast(tf.round((resized - tf.constant(size, tf.int64)) / 2), tf.int32)
    image = image[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
    return tf.ensure_shape(image, [*size, channels])
