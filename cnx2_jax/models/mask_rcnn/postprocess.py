"""From the box head's outputs to detections, and from their small masks to those of whole images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS, SMALLEST_SIDE, decode
from cnx2_jax.models.mask_rcnn.heads import BoxOutputs
from cnx2_jax.models.mask_rcnn.nms import soft_nms

SCORE_THRESHOLD = 0.05  # of the probability, before suppression
MASK_THRESHOLD = 0.5


class Detected(NamedTuple):
    """The objects found, by falling score.

    Attributes:
      boxes: `[..., count, 4]` in pixels; 0 where there is none.
      scores: after suppression; 0 where there is none.
      classes: int32, from 0.
      valid: whether there is an object.
    """

    boxes: Float[Array, "*b count 4"]
    scores: Float[Array, "*b count"]
    classes: Int[Array, "*b count"]
    valid: Bool[Array, "*b count"]


def select(
    outputs: BoxOutputs,
    proposals: Float[Array, "r 4"],
    valid: Bool[Array, " r"],
    size: Int[Array, "2"],
    count: int,
) -> Detected:
    """Returns the best `count` objects of one image after soft suppression within each class.

    Every proposal can give an object of each class whose probability exceeds SCORE_THRESHOLD.

    Args:
      outputs: for one image, without `B`.
      proposals: in pixels.
      valid: which of them exist.
      size: height and width of the image in pixels, without padding.
      count: places of the result.
    """
    scores = jax.nn.softmax(outputs.logits, axis=-1)[:, :-1]
    scores = jnp.where(valid[:, None] & (scores > SCORE_THRESHOLD), scores, 0)
    around = jnp.broadcast_to(proposals[:, None], outputs.deltas.shape)
    boxes = decode(around, outputs.deltas, HEAD_STDS, size).swapaxes(0, 1)
    kept = soft_nms(boxes, scores.T, count)
    valid = kept.scores > 0
    found = jnp.where(valid[:, None], boxes[kept.classes, kept.indices], 0)
    return Detected(found, kept.scores, jnp.where(valid, kept.classes, 0), valid)


def paste_masks(
    masks: Float[np.ndarray, "n side side"], boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> Bool[np.ndarray, "n height width"]:
    """Returns which pixels of an image each mask covers; for the host.

    A mask lies on its box; pixels take bilinear values at their centres, and those of at least MASK_THRESHOLD
    are covered (mmdetection's `_do_paste_mask`). No pixel outside of the box reaches the threshold.

    Args:
      masks: probabilities.
      boxes: in pixels of the image that the result is for.
      size: height and width of that image.
    """
    covered = np.zeros((len(masks), *size), bool)
    for mask, box, out in zip(masks, boxes, covered, strict=True):
        windows, weights = [], []
        for axis in range(2):
            start, end = float(box[axis]), float(box[axis + 2])
            first = max(0, int(np.ceil(start - 0.5)))
            last = min(size[axis], int(np.floor(end - 0.5)) + 1)
            cells = mask.shape[axis] / max(end - start, SMALLEST_SIDE)
            places = (np.arange(first, last) + 0.5 - start) * cells - 0.5
            away = np.abs(places[:, None] - np.arange(mask.shape[axis]))
            windows.append(slice(first, max(first, last)))
            weights.append(np.maximum(0, 1 - away))
        out[tuple(windows)] = weights[0] @ mask @ weights[1].T >= MASK_THRESHOLD
    return covered
