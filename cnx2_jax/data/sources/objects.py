"""The objects of annotated images as fields and stored entries of a source."""

from collections.abc import Callable

import numpy as np

from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.fields import Entry, Field, Identifier, Instances
from cnx2_jax.data.tensorflow import tf

_LEAST_SIDE = 1.0  # pixels; mmdetection trains on no smaller box


def object_fields(annotations: Annotations) -> dict[str, Field]:
    """Returns the fields `instances`, with room for all objects of any image, and `id`."""
    most = int(annotations.counts.max(initial=1))
    return {"instances": Instances(annotations.class_names, most), "id": Identifier()}


def object_reader(annotations: Annotations) -> Callable[[tf.Tensor], dict[str, Entry]]:
    """Returns a function that maps an index to the stored entries of both fields.

    Leaves out crowds and, as mmdetection does, objects of no area and of less than a pixel's height or width
    inside the image. Boxes are clipped to the image.
    """
    boxes, inside = _clipped(annotations)
    large = (inside >= _LEAST_SIDE).all(axis=1) & (annotations.areas > 0)
    chosen = large & ~annotations.crowds
    objects = annotations.kept(chosen)
    starts, sizes = tf.constant(objects.starts), tf.constant(objects.sizes)
    columns = {
        "boxes": tf.constant(boxes[chosen]),
        "classes": tf.constant(objects.classes),
        "masks": tf.constant(objects.masks, tf.string, shape=[len(objects.masks)]),
    }
    ids = tf.constant(annotations.image_ids)

    def read(index: tf.Tensor) -> dict[str, Entry]:
        first, last = starts[index], starts[index + 1]
        rows = {name: column[first:last] for name, column in columns.items()}
        return {"instances": {**rows, "size": sizes[index]}, "id": ids[index]}

    return read


def _clipped(annotations: Annotations) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes as y0, x0, y1, x1 in their images, float32 [n, 4], and their sides there, [n, 2]."""
    limits = np.repeat(annotations.sizes, annotations.counts, axis=0)
    x, y, width, height = annotations.boxes.T
    corners = np.stack([y, x, y + height, x + width], axis=1).reshape(-1, 2, 2)
    corners = np.clip(corners, 0, limits[:, None]).astype(np.float32)
    return corners.reshape(-1, 4), corners[:, 1] - corners[:, 0]
