"""The 1,797 handwritten digits that scikit-learn ships: a data set that needs no download."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.data.fields import Image as ImageField
from cnx2_jax.data.fields import Label
from cnx2_jax.data.sources.base import Source, held_out
from cnx2_jax.data.tensorflow import tf

# Fixed, so that results of different configs compare.
_VAL_FRACTION = 0.2


def open_digits(split: str) -> Source:
    """Opens the 8x8 digits of one split, as PNGs: encoded like the images of every other source."""
    digits = load_digits()
    labels = digits.target.astype(np.int32)
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    contents = tf.constant([_png(image) for image in pixels])
    numbers = tf.constant(labels)
    source = Source(
        num_records=len(labels),
        fields={"image": ImageField(), "label": Label(tuple(str(name) for name in digits.target_names))},
        labels=labels,
        read=lambda index: {"image": contents[index], "label": numbers[index]},
        describe=lambda index: f"digits/{index}",
    )
    names = (f"digits/{index}".encode() for index in range(len(labels)))
    val = held_out(names, labels, _VAL_FRACTION)
    return source.only(val if split == "val" else ~val)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
