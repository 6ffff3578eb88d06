"""The 1,797 handwritten digits that scikit-learn ships: a data set that needs no download."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.data.fields import Image as ImageField
from cnx2_jax.data.fields import Label
from cnx2_jax.data.sources.base import Source, held_out
from cnx2_jax.data.tensorflow import tf

# Fixed, so that results of different configs compare.
_VAL_FRACTION = 0.2


class Digits(NamedTuple):
    """The digits of one split.

    Attributes:
      ink: float64 [n, 8, 8], 0 to 16.
      labels: int32 [n], the digit.
      indices: int64 [n], the place in scikit-learn's order.
      names: of the labels.
    """

    ink: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]


def split_digits(split: str) -> Digits:
    """Returns the digits of "train" or "val", which have none in common."""
    digits = load_digits()
    labels = digits.target.astype(np.int32)
    val = held_out((f"digits/{index}".encode() for index in range(len(labels))), labels, _VAL_FRACTION)
    indices = np.flatnonzero(val if split == "val" else ~val)
    names = tuple(str(name) for name in digits.target_names)
    return Digits(digits.images[indices], labels[indices], indices, names)


def open_digits(split: str) -> Source:
    """Opens the 8x8 digits of one split, as PNGs: encoded like the images of every other source."""
    digits = split_digits(split)
    pixels = np.round(digits.ink * (255 / 16)).astype(np.uint8)
    contents = tf.constant([_png(image) for image in pixels])
    numbers = tf.constant(digits.labels)
    return Source(
        num_records=len(digits.labels),
        fields={"image": ImageField(), "label": Label(digits.names)},
        labels=digits.labels,
        read=lambda index: {"image": contents[index], "label": numbers[index]},
        describe=lambda index: f"digits/{digits.indices[index]}",
    )


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
