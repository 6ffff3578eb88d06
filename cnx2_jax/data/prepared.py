"""Images to predict on, one at a time: each as it is stored, and resized as evaluation resizes it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from cnx2_jax.data import pipeline, sizes
from cnx2_jax.data.fields import Image
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.resizing import PLAIN_BILINEAR
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf

CANVAS_STEP = 128  # sides of canvases are multiples of it, so that images of similar sizes share a program

Bounds = tuple[int, int]  # of the longer and the shorter side


class PreparedImage(NamedTuple):
    """An image to predict on.

    Attributes:
      original: the image itself.
      scaled: the same within each of the bounds, without padding.
    """

    original: UInt8[np.ndarray, "height width channels"]
    scaled: tuple[UInt8[np.ndarray, "_h _w channels"], ...]


def prepared_images(source: Source, field: Image, scales: tuple[Bounds, ...]) -> Iterator[PreparedImage]:
    """Yields the images of any source in their order.

    Args:
      source: has a field "image", such as one from `open_files`; other fields are not read.
      field: decodes the images.
      scales: the bounds of each resized image.

    Raises:
      UserError: from the iterator, an image cannot be read.
    """

    # One trace for all sizes.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec([], tf.int64)])
    def prepared(index: tf.Tensor) -> tuple[tf.Tensor, tuple[tf.Tensor, ...]]:
        image = field.decode(source.read(index)["image"])
        return image, at_scales(image, scales)

    for index in range(source.num_records):
        try:
            original, scaled = prepared(tf.constant(index, tf.int64))
        except pipeline.FAILURES as error:
            raise pipeline.unreadable(source.name_of(index, "image"), error, field) from error
        yield PreparedImage(original.numpy(), tuple(image.numpy() for image in scaled))


def at_scales(image: tf.Tensor, scales: tuple[Bounds, ...]) -> tuple[tf.Tensor, ...]:
    """Returns an image resized to fit each of the bounds."""
    source = tf.shape(image)[:2]
    steps = (Geometry(source, sizes.fitted(source, *each), kernel=PLAIN_BILINEAR) for each in scales)
    return tuple(step.image(image) for step in steps)


def on_canvas(image: UInt8[np.ndarray, "h w c"], multiple: int) -> UInt8[np.ndarray, "1 height width c"]:
    """Returns a batch of one image, padded at bottom and right to multiples of `multiple`."""
    missing = [(0, -side % multiple) for side in image.shape[:2]]
    return np.pad(image, [*missing, (0, 0)])[None]
