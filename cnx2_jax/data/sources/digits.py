"""The 1,797 handwritten digits that scikit-learn ships: a data set that needs no download."""

import importlib.util
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cnx2_jax.data.fields import Image as ImageField
from cnx2_jax.data.fields import Label, MultiLabel, Value
from cnx2_jax.data.sources.base import Source, held_out, stored_sets
from cnx2_jax.data.tensorflow import tf

# Fixed, so that results of different configs compare.
_VAL_FRACTION = 0.2
_SPLITS = ("train", "val")
_ROWS = {"train": 2000, "val": 400}
_MOST_IN_ROW = 3


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
    contents = tf.constant([_png(_pixels(image)) for image in digits.ink])
    numbers = tf.constant(digits.labels)
    return Source(
        num_records=len(digits.labels),
        fields={"image": ImageField(), "label": Label(digits.names)},
        labels=digits.labels,
        read=lambda index: {"image": contents[index], "label": numbers[index]},
        describe=lambda index: f"digits/{digits.indices[index]}",
    )


def open_digit_rows(split: str) -> Source:
    """Opens pictures of one to three digits side by side, 8x24; record i is a function of (split, i) alone.

    The digits are those of the same split of the source `digits`. Field "labels" is the set of digits in the
    picture, "value" their sum.
    """
    digits = split_digits(split)
    count = _ROWS[split]
    sets, sums = np.zeros((count, len(digits.names)), bool), np.zeros((count, 1))
    contents = []
    for index in range(count):
        rng = np.random.default_rng([_SPLITS.index(split), index])
        places = rng.permutation(_MOST_IN_ROW)[: rng.integers(1, _MOST_IN_ROW + 1)]
        ink = np.zeros((_MOST_IN_ROW, 8, 8))
        chosen = rng.integers(len(digits.labels), size=len(places))
        ink[places] = digits.ink[chosen]
        contents.append(_png(_pixels(np.concatenate(ink, axis=1))))
        sets[index, digits.labels[chosen]] = True
        sums[index] = digits.labels[chosen].sum()
    images, entries, values = tf.constant(contents), stored_sets(sets), tf.constant(sums)
    return Source(
        num_records=count,
        fields={"image": ImageField(), "labels": MultiLabel(digits.names), "value": Value(1, ("sum",))},
        labels=None,
        read=lambda index: {"image": images[index], "labels": entries[index], "value": values[index]},
        describe=lambda index: f"digit_rows/{split}/{index}",
        targets={"labels": sets.astype(np.float64), "value": sums},
    )


def _pixels(ink: np.ndarray) -> np.ndarray:
    """Returns ink, 0 to 16, as uint8."""
    return np.round(ink * (255 / 16)).astype(np.uint8)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
