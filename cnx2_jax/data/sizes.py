"""Heights and widths: of the images of a source, and of what they are resized to."""

import math

import numpy as np

from cnx2_jax.data.decoding import decoded_size
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf


def image_sizes(source: Source, most: int | None = None) -> np.ndarray:
    """Returns height and width, int32 [n, 2], of up to `most` images spread over the source; of all if None.

    Reads only the headers of JPEGs, and turns the sizes of those that are to be turned upright. Images that
    cannot be read are left out.
    """

    @tf.autograph.experimental.do_not_convert
    def size(index: tf.Tensor) -> tf.Tensor:
        return decoded_size(source.read(index)["image"])

    count = source.num_records if most is None else most
    chosen = np.unique(np.linspace(0, source.num_records - 1, count).astype(np.int64))
    sizes = tf.data.Dataset.from_tensor_slices(chosen).map(size, num_parallel_calls=4).ignore_errors()
    return np.array(list(sizes.as_numpy_iterator()), np.int32).reshape(-1, 2)


def fitted(size: tf.Tensor, long: tf.Tensor | int, short: tf.Tensor | int) -> tf.Tensor:
    """Returns the largest size of the same aspect ratio within two bounds, as mmcv's `rescale_size` does.

    Args:
      size: int32 [..., 2], height and width.
      long, short: scalar int32; the bounds of the longer and the shorter side.

    Returns:
      int32 [..., 2], at least 1.
    """
    sides = tf.cast(size, tf.float64)
    factor = tf.minimum(
        tf.cast(long, tf.float64) / tf.reduce_max(sides, axis=-1, keepdims=True),
        tf.cast(short, tf.float64) / tf.reduce_min(sides, axis=-1, keepdims=True),
    )
    return tf.maximum(tf.cast(sides * factor + 0.5, tf.int32), 1)


def canvas(sizes: np.ndarray, multiple: int = 1) -> tuple[int, int]:
    """Returns the least height and width, multiples of `multiple`, in which all sizes, [n, 2], fit."""
    height, width = sizes.max(axis=0, initial=1).tolist()
    return multiple * math.ceil(height / multiple), multiple * math.ceil(width / multiple)
