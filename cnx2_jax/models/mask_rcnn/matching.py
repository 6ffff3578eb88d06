"""Assigns each anchor or proposal to an object by overlap, as mmdetection's MaxIoUAssigner does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cnx2_jax.models.mask_rcnn.boxes import iou

NEGATIVE = -1
IGNORED = -2


def match(
    boxes: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    objects: Float[Array, "m 4"],
    present: Bool[Array, " m"],
    *,
    positive: float,
    negative: float,
    lowest: float | None = None,
) -> Int[Array, " n"]:
    """Returns the object of each box, int32: its index, NEGATIVE (background) or IGNORED (neither).

    Args:
      boxes: anchors or proposals.
      valid: which of them exist; the others are IGNORED.
      objects: boxes of the ground truth.
      present: which of them exist; without any, all boxes are negative.
      positive: least overlap with the best object at which a box is assigned to it.
      negative: overlap below which a box is negative.
      lowest: if given, every object also gets all boxes of its own best overlap if that is at least this
        much. A box that is best for several objects gets the last of them.
    """
    overlaps = jnp.where(valid[:, None] & present, iou(boxes, objects), -1)
    # The comparison below needs the very values that the maximum was taken of; computed twice, in two
    # fusions, they may be rounded differently.
    overlaps = jax.lax.optimization_barrier(overlaps)
    best = overlaps.max(axis=1, initial=-1)
    matched = jnp.where(best < negative, NEGATIVE, IGNORED)
    matched = jnp.where(best >= positive, overlaps.argmax(axis=1), matched)
    if lowest is not None:
        most = overlaps.max(axis=0, initial=-1)
        is_best = (overlaps == most) & (most >= lowest)
        last = jnp.where(is_best, jnp.arange(len(objects)), -1).max(axis=1, initial=-1)
        matched = jnp.where(last >= 0, last, matched)
    return jnp.where(valid, matched, IGNORED).astype(jnp.int32)
