"""The 1,797 handwritten digits that scikit-learn ships: a data set that needs no download."""

import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

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
    ink, labels = _load()
    val = held_out((f"digits/{index}".encode() for index in range(len(labels))), labels, _VAL_FRACTION)
    indices = np.flatnonzero(val if split == "val" else ~val)
    return Digits(ink[indices], labels[indices], indices, tuple(map(str, range(10))))


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Returns what `sklearn.datasets.load_digits` does, ink [n, 8, 8] and labels [n].

    It reads scikit-learn's file, because an import of scikit-learn takes two seconds.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int32)


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
