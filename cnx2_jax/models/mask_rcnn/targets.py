"""What the heads are trained towards: sampled anchors and regions, their classes and deltas, and masks."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS, RPN_STDS, SMALLEST_SIDE, encode
from cnx2_jax.models.mask_rcnn.heads import MASK_SIDE
from cnx2_jax.models.mask_rcnn.matching import IGNORED, NEGATIVE, match
from cnx2_jax.models.mask_rcnn.roi_align import axis_weights, samples_per_bin
from cnx2_jax.models.mask_rcnn.sampling import sample


class Truth(NamedTuple):
    """The objects of each image, padded to a fixed number M; functions of one image take it without `B`.

    Attributes:
      boxes: `[B, M, 4]` in pixels, y0, x0, y1, x1.
      classes: int32 `[B, M]`, from 0.
      valid: whether there is an object.
      masks: `[B, M, m, m]` from 0 to 1: each object's mask, cropped to its own box and resampled to m x m.
    """

    boxes: Float[Array, "*b m 4"]
    classes: Int[Array, "*b m"]
    valid: Bool[Array, "*b m"]
    masks: Num[Array, "*b m side side"]


class RPNTargets(NamedTuple):
    """The anchors of an image that count in the loss; see `Sample` for the first three.

    Attributes:
      indices: of the anchors.
      positive: whether it has an object.
      valid: whether there is an anchor.
      deltas: from the anchor to the object's box; meaningless unless it is positive.
    """

    indices: Int[Array, "*b s"]
    positive: Bool[Array, "*b s"]
    valid: Bool[Array, "*b s"]
    deltas: Float[Array, "*b s 4"]


class RoITargets(NamedTuple):
    """The regions of an image that count in the loss; the positive ones come first.

    Attributes:
      boxes: in pixels; 0 where there is none.
      valid: whether there is a region.
      positive: whether it has an object.
      classes: of the object; the number of classes where there is none.
      deltas: from the region to the object's box; meaningless unless it is positive.
      objects: index of the object; 0 unless it is positive.
    """

    boxes: Float[Array, "*b s 4"]
    valid: Bool[Array, "*b s"]
    positive: Bool[Array, "*b s"]
    classes: Int[Array, "*b s"]
    deltas: Float[Array, "*b s 4"]
    objects: Int[Array, "*b s"]


def rpn_targets(
    key: Key[Array, ""],
    anchors: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    truth: Truth,
    count: int,
) -> RPNTargets:
    """Draws `count` anchors of one image, at most half of them positive.

    Args:
      key: of the image.
      anchors: of all levels.
      valid: which of them exist.
      truth: of the image.
      count: places of the result.
    """
    matched = match(anchors, valid, truth.boxes, truth.valid, positive=0.7, negative=0.3, lowest=0.3)
    index, positive, drawn = sample(key, matched >= 0, matched == NEGATIVE, count, count // 2)
    objects = jnp.maximum(matched[index], 0)
    return RPNTargets(index, positive, drawn, encode(anchors[index], truth.boxes[objects], RPN_STDS))


def roi_targets(
    key: Key[Array, ""],
    proposals: Float[Array, "p 4"],
    valid: Bool[Array, " p"],
    truth: Truth,
    count: int,
    num_classes: int,
) -> RoITargets:
    """Draws `count` regions from one image's proposals and objects' boxes, at most a quarter positive.

    Args:
      key: of the image.
      proposals: in pixels.
      valid: which of them exist.
      truth: of the image.
      count: places of the result.
      num_classes: the class of the background.
    """
    itself = jnp.where(truth.valid, jnp.arange(len(truth.boxes)), IGNORED)
    matched = match(proposals, valid, truth.boxes, truth.valid, positive=0.5, negative=0.5)
    matched = jnp.concatenate([itself, matched])
    index, positive, drawn = sample(key, matched >= 0, matched == NEGATIVE, count, count // 4)
    boxes = jnp.where(drawn[:, None], jnp.concatenate([truth.boxes, proposals])[index], 0)
    objects = jnp.where(positive, matched[index], 0)
    classes = jnp.where(positive, truth.classes[objects], num_classes)
    deltas = encode(boxes, truth.boxes[objects], HEAD_STDS)
    return RoITargets(boxes, drawn, positive, classes, deltas, objects)


def mask_targets(
    boxes: Float[Array, "r 4"], objects: Int[Array, " r"], truth: Truth
) -> Float[Array, "r side side"]:
    """Returns the mask of each region's object within the region, 0 or 1, `[R, MASK_SIDE, MASK_SIDE]`.

    As mmdetection does with whole masks, it is RoIAlign of the mask, then a threshold of 0.5. The samples are
    at the same places of the image, and take bilinear values of the object's cropped mask, 0 outside of it.

    Args:
      boxes: the regions, in pixels.
      objects: the index of each one's object.
      truth: of the image.
    """
    object_boxes = truth.boxes[objects]
    masks = truth.masks[objects].astype(boxes.dtype)
    side = masks.shape[-1]
    weights = []
    for axis in range(2):
        scale = side / jnp.maximum(object_boxes[:, axis + 2] - object_boxes[:, axis], SMALLEST_SIDE)
        length = boxes[:, axis + 2] - boxes[:, axis]
        start = (boxes[:, axis] - object_boxes[:, axis]) * scale - 0.5
        weights.append(
            axis_weights(start, length * scale, samples_per_bin(length, MASK_SIDE), MASK_SIDE, side)
        )
    values = jnp.einsum("rph,rhw,rqw->rpq", weights[0], masks, weights[1])
    return (values >= 0.5).astype(boxes.dtype)
