"""Boxes: areas, overlaps, clipping, and the deltas that lead from one box to another.

A box is y0, x0, y1, x1 in pixels, with the origin at the top left corner of the canvas. Deltas are dx, dy,
dw, dh as in R-CNN (arXiv 1311.2524, appendix C), which is the order of mmdetection's weights.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Boxes = Float[Array, "*n 4"]
Stds = tuple[float, float, float, float]

RPN_STDS: Stds = (1.0, 1.0, 1.0, 1.0)
HEAD_STDS: Stds = (0.1, 0.1, 0.2, 0.2)
# A box is at most 62.5 times as large as its anchor, and at least a 62.5th (mmdetection's wh_ratio_clip).
LARGEST_LOG_RATIO = -math.log(16 / 1000)
SMALLEST_UNION = 1e-6  # square pixels; mmdetection's eps
SMALLEST_SIDE = 1e-6  # pixels; keeps the deltas of empty boxes finite


def area(boxes: Boxes) -> Float[Array, "*n"]:
    """Returns the areas in square pixels; a box of negative height or width has area 0."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def iou(boxes: Float[Array, "n 4"], others: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Returns the intersection over union of every box with every other; 0 if both are empty."""
    # Coordinate by coordinate: arrays whose last axis has size 2 or 4 waste a TPU's lanes.
    y0, x0, y1, x1 = (boxes[:, None, i] for i in range(4))
    other_y0, other_x0, other_y1, other_x1 = (others[None, :, i] for i in range(4))
    height = jnp.maximum(jnp.minimum(y1, other_y1) - jnp.maximum(y0, other_y0), 0)
    width = jnp.maximum(jnp.minimum(x1, other_x1) - jnp.maximum(x0, other_x0), 0)
    intersection = height * width
    union = area(boxes)[:, None] + area(others)[None] - intersection
    return intersection / jnp.maximum(union, SMALLEST_UNION)


def clip(boxes: Boxes, size: Int[Array, "2"]) -> Boxes:
    """Moves corners that are outside of an image of this height and width to its border."""
    return jnp.clip(boxes, 0, jnp.tile(size, 2).astype(boxes.dtype))


def encode(anchors: Boxes, boxes: Boxes, stds: Stds) -> Boxes:
    """Returns the deltas that lead from anchors to boxes, each divided by its standard deviation.

    Sides below `SMALLEST_SIDE` count as that long.
    """
    y, x, height, width = _centre_form(anchors)
    box_y, box_x, box_height, box_width = _centre_form(boxes)
    height, width = jnp.maximum(height, SMALLEST_SIDE), jnp.maximum(width, SMALLEST_SIDE)
    deltas = [
        (box_x - x) / width,
        (box_y - y) / height,
        jnp.log(jnp.maximum(box_width, SMALLEST_SIDE) / width),
        jnp.log(jnp.maximum(box_height, SMALLEST_SIDE) / height),
    ]
    return jnp.stack(deltas, axis=-1) / jnp.asarray(stds, anchors.dtype)


def decode(anchors: Boxes, deltas: Boxes, stds: Stds, size: Int[Array, "2"]) -> Boxes:
    """Returns the boxes that deltas lead to from anchors, clipped to an image of this height and width.

    The logarithms of sides are limited to +-`LARGEST_LOG_RATIO` first.
    """
    dx, dy, dw, dh = jnp.moveaxis(deltas * jnp.asarray(stds, deltas.dtype), -1, 0)
    y, x, height, width = _centre_form(anchors)
    y, x = y + dy * height, x + dx * width
    half_height = 0.5 * height * jnp.exp(jnp.clip(dh, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    half_width = 0.5 * width * jnp.exp(jnp.clip(dw, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    corners = [y - half_height, x - half_width, y + half_height, x + half_width]
    return clip(jnp.stack(corners, axis=-1), size)


def _centre_form(boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Returns the centres' y and x, the heights and the widths."""
    y0, x0, y1, x1 = jnp.moveaxis(boxes, -1, 0)
    return 0.5 * (y0 + y1), 0.5 * (x0 + x1), y1 - y0, x1 - x0
