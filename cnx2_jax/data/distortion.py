"""mmsegmentation's PhotoMetricDistortion, in TensorFlow, with OpenCV's arithmetic on uint8.

mmdetection's class of the same name is another one: it works on floats and hues up to 360.
"""

from cnx2_jax.data.tensorflow import tf

BRIGHTNESS = 32.0  # the largest change of a level
LOW, HIGH = 0.5, 1.5  # factors of contrast and saturation
HUES = 180  # OpenCV's hue of 8 bits counts steps of 2 degrees
HUE = 18  # changes are whole numbers from -HUE to HUE - 1

# Four pairs of (whether, how much), in the order of the operations, and the place of contrast.
DRAWS = 9
_SHIFT = 12  # OpenCV's fixed point
# In float32 a whole number may come out a little too small.
_WHOLE = 2.0**-12


def distort(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Changes brightness, contrast, saturation and hue, each of them half of the time, in this order.

    By the last draw, contrast comes after hue instead. Levels are clipped and truncated after each step.

    Args:
      image: uint8 [h, w, 3], RGB.
      draws: float32 [DRAWS], uniform in [0, 1).

    Returns:
      uint8 [h, w, 3].
    """
    brightness, contrast, saturation, hue = ((draws[2 * i], draws[2 * i + 1]) for i in range(4))
    contrast_first = draws[DRAWS - 1] < 0.5

    def half_of_the_time(pair, change, *, also=True):
        chance, amount = pair
        return tf.cond((chance < 0.5) & also, lambda: change(image, amount), lambda: image)

    image = half_of_the_time(brightness, lambda x, u: _converted(x, beta=BRIGHTNESS * (2 * u - 1)))
    image = half_of_the_time(contrast, lambda x, u: _converted(x, _factor(u)), also=contrast_first)
    image = half_of_the_time(saturation, lambda x, u: saturate(x, _factor(u)))
    image = half_of_the_time(hue, lambda x, u: turn_hue(x, tf.cast(u * (2 * HUE), tf.int32) - HUE))
    return half_of_the_time(contrast, lambda x, u: _converted(x, _factor(u)), also=~contrast_first)


def saturate(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiplies the saturation of uint8 [h, w, 3] by `factor`, scalar float32."""
    hue, saturation, value = to_hsv(image)
    saturation = tf.cast(_converted(tf.cast(saturation, tf.uint8), factor), tf.int32)
    return from_hsv(hue, saturation, value)


def turn_hue(image: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """Adds `steps`, scalar int32, of 2 degrees each, to the hue of uint8 [h, w, 3]."""
    hue, saturation, value = to_hsv(image)
    return from_hsv(tf.math.floormod(hue + steps, HUES), saturation, value)


def to_hsv(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns what `cv2.cvtColor(image, cv2.COLOR_RGB2HSV)` does, each part int32 [h, w].

    Hue is in [0, 180), saturation and value in [0, 255].
    """
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), axis=-1)
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)
    saturation = _fixed(spread * _reciprocal(255.0, value))
    sector = tf.where(
        value == red,
        green - blue,
        tf.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = _fixed(sector * _reciprocal(HUES / 6, spread))
    return tf.where(hue < 0, hue + HUES, hue), saturation, value


def from_hsv(hue: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """Returns what `cv2.cvtColor(image, cv2.COLOR_HSV2RGB)` does of the parts that `to_hsv` returns.

    Levels are truncated, as by OpenCV's vector instructions; it rounds the last few pixels of a row instead.

    Returns:
      uint8 [h, w, 3].
    """
    sector = tf.cast(hue, tf.float32) * (6 / HUES)
    value = tf.cast(value, tf.float32)
    chroma = value * (tf.cast(saturation, tf.float32) * (1 / 255))

    # A channel is `value` less `chroma` times a trapezoid of the hue, whose place differs by channel.
    def channel(place: int) -> tf.Tensor:
        distance = tf.math.floormod(place + sector, 6.0)
        away = tf.clip_by_value(tf.minimum(distance, 4 - distance), 0.0, 1.0)
        return tf.cast(value - chroma * away + _WHOLE, tf.uint8)

    return tf.stack([channel(5), channel(3), channel(1)], axis=-1)


def _converted(values: tf.Tensor, alpha: tf.Tensor | float = 1.0, beta: tf.Tensor | float = 0.0) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.cast(values, tf.float32) * alpha + beta, 0.0, 255.0), tf.uint8)


def _factor(draw: tf.Tensor) -> tf.Tensor:
    return LOW + (HIGH - LOW) * draw


def _reciprocal(top: float, values: tf.Tensor) -> tf.Tensor:
    """Returns top / values in fixed point, int32; 0 for 0."""
    quotient = tf.math.divide_no_nan(top * 2.0**_SHIFT, tf.cast(values, tf.float32))
    return tf.cast(tf.round(quotient), tf.int32)


def _fixed(products: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.right_shift(products + (1 << (_SHIFT - 1)), _SHIFT)
