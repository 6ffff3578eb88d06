"""Generated images, all of one size and cost: for benchmarks and smoke runs."""

import io
import math
import re

import numpy as np
from PIL import Image

from cnx2_jax.data.fields import Image as ImageField
from cnx2_jax.data.fields import Label
from cnx2_jax.data.sources.base import Source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

# The number of records and classes of ImageNet-1K, and the average size of its photographs.
_TRAIN_RECORDS, _CLASSES = 1_281_167, 1000
_HEIGHT, _WIDTH = 375, 500
_TRAIN_PER_VAL = 25
_DIFFERENT = 32


def open_synthetic(size: str, split: str) -> Source:
    """Opens JPEGs of 500x375 pixels of coloured noise; record i is picture i % 32 and of class i % classes.

    Args:
      size: what follows `synthetic:` in `data.source`: `RECORDS` or `RECORDS:CLASSES`; empty for those of
        ImageNet-1K, 1,281,167 and 1,000. The val split has one record for every 25 training records.
      split: "train" or "val".

    Raises:
      UserError: `size` has another form.
    """
    # At most nine digits, because the labels of more records would not fit into memory.
    match = re.fullmatch(r"(?:([0-9]{1,9})(?::([0-9]{1,9}))?)?", size)
    num_records = int((match and match[1]) or _TRAIN_RECORDS)
    num_classes = int((match and match[2]) or min(_CLASSES, num_records))
    if match is None or not 1 <= num_classes <= num_records:
        raise UserError(
            f"data.source 'synthetic:{size}' must be synthetic, synthetic:RECORDS or "
            "synthetic:RECORDS:CLASSES, with no more classes than records and fewer than a billion records"
        )
    if split == "val":
        num_records = max(1, num_records // _TRAIN_PER_VAL)
    rng = np.random.default_rng(0 if split == "train" else 1)
    pictures = tf.constant([_jpeg(rng) for _ in range(_DIFFERENT)])
    digits = len(str(num_classes - 1))
    return Source(
        num_records=num_records,
        fields={
            "image": ImageField(),
            "label": Label(tuple(f"{label:0{digits}}" for label in range(num_classes))),
        },
        labels=np.arange(num_records, dtype=np.int32) % num_classes,
        read=lambda index: {
            "image": pictures[index % _DIFFERENT],
            "label": tf.cast(index % num_classes, tf.int32),
        },
        describe=lambda index: f"synthetic/{split}/{index}",
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    """Returns noise of several grains, with the file size of a photograph (70 to 110 KB)."""
    image = np.zeros((_HEIGHT, _WIDTH, 3))
    for grain, strength in ((2, 9), (5, 12), (20, 20), (80, 40)):
        shape = (math.ceil(_HEIGHT / grain), math.ceil(_WIDTH / grain), 3)
        noise = rng.normal(0, strength, shape).repeat(grain, axis=0).repeat(grain, axis=1)
        image += noise[:_HEIGHT, :_WIDTH]
    buffer = io.BytesIO()
    pixels = np.clip(image + rng.uniform(64, 192, 3), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
