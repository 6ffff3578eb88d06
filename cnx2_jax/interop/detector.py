"""Composes Mask R-CNN, from the stage maps on, of operations of frameworks that do not read StableHLO.

It repeats `models/mask_rcnn` for images without padding: all anchors exist, and all boxes are clipped to one
size. So `models/mask_rcnn` explains what is done here and why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.interop.operations import Tensor, Value
from cnx2_jax.models import MaskRCNN
from cnx2_jax.models.mask_rcnn.anchors import grid_anchors
from cnx2_jax.models.mask_rcnn.boxes import (
    HEAD_STDS,
    LARGEST_LOG_RATIO,
    RPN_STDS,
    SMALLEST_UNION,
    Stds,
)
from cnx2_jax.models.mask_rcnn.heads import BOX_BINS, MASK_BINS, MASK_SIDE
from cnx2_jax.models.mask_rcnn.nms import DECAY_OVERLAP, LOWEST_SCORE
from cnx2_jax.models.mask_rcnn.postprocess import SCORE_THRESHOLD
from cnx2_jax.models.mask_rcnn.roi_align import FINEST_SIDE
from cnx2_jax.models.mask_rcnn.rpn import LARGEST_OVERLAP

MISSING = np.float32(-3e38)  # logit of a box that is suppressed


class Corners(NamedTuple):
    """Boxes, coordinate by coordinate."""

    y0: Value
    x0: Value
    y1: Value
    x1: Value

    @classmethod
    def of(cls, boxes: Value) -> Corners:
        """Splits boxes `[..., 4]`."""
        return cls(*(boxes.then("column", index) for index in range(4)))

    def each(self, change: Callable[[Value], Value]) -> Corners:
        return Corners(*map(change, self))

    def stacked(self) -> Value:
        """Returns boxes `[..., 4]`."""
        operations = self.y0.operations
        return Value(operations, operations.stack([corner.tensor for corner in self]))

    def area(self) -> Value:
        return (self.y1 - self.y0).apply("Max", 0) * (self.x1 - self.x0).apply("Max", 0)


def detect(model: InferenceModel, layers: Any, maps: list[Tensor]) -> dict[str, Tensor]:
    """Runs the detector on the stage maps `[B, h, w, C]`.

    Args:
      model: of a MaskRCNN.
      layers: implements `Layers` and `Operations`.
      maps: of the four stages.

    Returns:
      The results by name; see `InferenceModel.outputs`.
    """
    network = model.network
    assert isinstance(network, MaskRCNN), "other networks are composed in layers.py"
    size = model.shape[0], model.shape[1]
    patch = network.config.patch_size
    levels = _pyramid(model, layers, maps)
    boxes, valid, count = _propose(network, layers, levels, size)
    head = "roi_head.bbox_head"
    regions = _cut(layers, levels, boxes, patch, BOX_BINS)
    x = layers.reshape(regions, [-1, BOX_BINS, BOX_BINS, network.channels])
    x = layers.relu(layers.patch_conv(x, f"{head}.shared_fcs.0"))  # a kernel as large as the region
    x = layers.reshape(x, [-1, count, network.fc_channels])
    x = layers.relu(layers.linear(x, f"{head}.shared_fcs.1"))
    logits, deltas = (Value(layers, layers.linear(x, f"{head}.{name}")) for name in ("fc_cls", "fc_reg"))
    found = _select(network, logits, deltas, boxes, valid, count, size)
    masks = _masks(network, layers, _cut(layers, levels, found.boxes, patch, MASK_BINS), found.classes)
    return {
        "boxes": found.boxes.tensor,
        "scores": found.scores.tensor,
        "classes": found.classes.then("as_int").tensor,
        "masks": masks.tensor,
        "count": found.valid.then("total", 1).then("as_int").tensor,
    }


def _pyramid(model: InferenceModel, layers: Any, maps: list[Tensor]) -> list[Tensor]:
    """Returns the five levels; see `FPN`."""
    maps = [layers.layer_norm(x, f"{model.encoder_prefix}norm{stage}") for stage, x in enumerate(maps)]
    merged = [layers.conv(x, f"neck.lateral_convs.{stage}.conv") for stage, x in enumerate(maps)]
    for stage in (2, 1, 0):
        merged[stage] = layers.add(layers.double(merged[stage + 1]), merged[stage])
    levels = [layers.conv(x, f"neck.fpn_convs.{stage}.conv") for stage, x in enumerate(merged)]
    return [*levels, layers.every_second(levels[-1])]


def _propose(
    network: MaskRCNN, layers: Any, levels: list[Tensor], size: tuple[int, int]
) -> tuple[Value, Value, int]:
    """Returns the proposals' boxes `[B, R, 4]`, whether they exist, 1 or 0, and R; see `rpn.propose`."""
    candidates, proposals = network.testing_counts
    all_scores, all_boxes, total = [], [], 0
    for index, level in enumerate(levels):
        stride = network.config.patch_size * 2**index
        anchors = np.asarray(grid_anchors((-(-size[0] // stride), -(-size[1] // stride)), stride))
        count = min(candidates, len(anchors))
        total += count
        x = layers.relu(layers.conv(level, "rpn_head.rpn_conv"))
        scores = layers.reshape(layers.conv(x, "rpn_head.rpn_cls"), [-1, len(anchors)])
        deltas = layers.reshape(layers.conv(x, "rpn_head.rpn_reg"), [-1, len(anchors), 4])
        best, places = layers.top_k(scores, count)
        around = Corners.of(Value(layers, layers.rows(anchors, places)))
        boxes = _decode(around, Value(layers, layers.take(deltas, places)), RPN_STDS, size)
        exists = (boxes.y1 > boxes.y0) & (boxes.x1 > boxes.x0)
        kept = _suppress(boxes, exists.then("as_float"), count)
        all_scores.append(Value(layers, best).where(float(MISSING), kept > 0.5).tensor)
        all_boxes.append(boxes.stacked().tensor)
    count = min(proposals, total)
    best, places = layers.top_k(layers.join(all_scores), count)
    valid = (Value(layers, best) > 0.5 * float(MISSING)).then("as_float")
    best_boxes = Value(layers, layers.take(layers.join(all_boxes), places))
    return best_boxes * valid.then("reshape", [-1, count, 1]), valid, count


def _decode(around: Corners, deltas: Value, stds: Stds, size: tuple[int, int]) -> Corners:
    """See `boxes.decode`; deltas `[..., 4]`."""
    dx, dy, dw, dh = (deltas.then("column", index) * std for index, std in enumerate(stds))
    height, width = around.y1 - around.y0, around.x1 - around.x0
    y, x = (around.y0 + around.y1) * 0.5 + dy * height, (around.x0 + around.x1) * 0.5 + dx * width
    limits = -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO
    half_height = height * 0.5 * dh.clip(*limits).apply("Exp")
    half_width = width * 0.5 * dw.clip(*limits).apply("Exp")
    return Corners(
        (y - half_height).clip(0, size[0]),
        (x - half_width).clip(0, size[1]),
        (y + half_height).clip(0, size[0]),
        (x + half_width).clip(0, size[1]),
    )


def _iou(boxes: Corners, others: Corners) -> Value:
    """See `boxes.iou`; the shapes broadcast."""
    height = (boxes.y1.apply("Min", others.y1) - boxes.y0.apply("Max", others.y0)).apply("Max", 0)
    width = (boxes.x1.apply("Min", others.x1) - boxes.x0.apply("Max", others.x0)).apply("Max", 0)
    intersection = height * width
    union = boxes.area() + others.area() - intersection
    return intersection / union.apply("Max", SMALLEST_UNION)


def _suppress(boxes: Corners, valid: Value, count: int) -> Value:
    """Returns which boxes `[B, n]` suppression keeps, 1 or 0; better ones come first. See `nms.nms`."""
    column = boxes.each(lambda x: x.then("reshape", [-1, count, 1]))
    row = boxes.each(lambda x: x.then("reshape", [-1, 1, count]))
    order = np.arange(count)
    better = (order[:, None] < order).astype(np.float32)[None]
    suppresses = (_iou(column, row) > LARGEST_OVERLAP).then("as_float") * better
    operations = valid.operations

    def refine(state: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        keep = Value(operations, state[0])
        hit = (suppresses * keep.then("reshape", [-1, count, 1])).then("maximum", 1)
        refined = valid * (hit < 0.5).then("as_float")
        changed = (refined - keep).apply("Abs").then("largest") > 0.5
        return changed.tensor, [refined.tensor], []

    ((keep,), _) = operations.loop(refine, [valid.tensor])
    return Value(operations, keep)


class _Selected(NamedTuple):
    """The objects, as in `postprocess.Detected`; `valid` is 1 or 0."""

    boxes: Value
    scores: Value
    classes: Value
    valid: Value


def _select(
    network: MaskRCNN,
    logits: Value,
    deltas: Value,
    proposals: Value,
    valid: Value,
    count: int,
    size: tuple[int, int],
) -> _Selected:
    """See `postprocess.select` and `nms.soft_nms`; of `count` proposals."""
    classes = network.num_classes
    operations = logits.operations
    scores = logits.then("softmax").then("first", classes)
    likely = (scores > SCORE_THRESHOLD) & (valid.then("reshape", [-1, count, 1]) > 0.5)
    scores = scores.where(0.0, likely).then("transpose", [0, 2, 1])
    around = Corners.of(proposals).each(lambda x: x.then("reshape", [-1, 1, count]))
    deltas = deltas.then("reshape", [-1, count, classes, 4]).then("transpose", [0, 2, 1, 3])
    boxes = _decode(around, deltas, HEAD_STDS, size).stacked()  # [B, classes, R, 4]

    def take(state: list[Tensor]) -> tuple[None, list[Tensor], list[Tensor]]:
        scores = Value(operations, state[0])
        chosen = scores.then("maximum", 2).then("argmax").then("reshape", [-1, 1])
        row = scores.then("take", chosen.tensor).then("reshape", [-1, count])
        place = row.then("argmax").then("reshape", [-1, 1])
        in_row = boxes.then("take", chosen.tensor).then("reshape", [-1, count, 4])
        best = in_row.then("take", place.tensor)  # [B, 1, 4]
        overlaps = _iou(Corners.of(best), Corners.of(in_row))
        lowered = row.where(row * (overlaps * -1.0 + 1.0), overlaps < DECAY_OVERLAP)
        lowered = lowered.where(0.0, lowered >= LOWEST_SCORE)
        chosen, place = chosen.then("as_float"), place.then("as_float")
        others = (place - np.arange(count, dtype=np.float32)[None]).apply("Abs") > 0.5
        lowered = lowered.where(0.0, others).then("reshape", [-1, 1, count])
        others = (chosen - np.arange(classes, dtype=np.float32)[None]).apply("Abs") > 0.5
        found = scores.where(lowered, others.then("reshape", [-1, classes, 1]))
        score = row.then("maximum", 1)
        collected = [best.then("reshape", [-1, 4]), score, chosen.then("reshape", [-1])]
        return None, [found.tensor], [x.tensor for x in collected]

    _, collected = operations.loop(take, [scores.tensor], network.detections)
    corners, scores, chosen = (Value(operations, x) for x in collected)
    corners = corners.then("transpose", [1, 0, 2])
    scores, chosen = (x.then("transpose", [1, 0]) for x in (scores, chosen))
    exists = (scores > 0).then("as_float")
    placed = exists.then("reshape", [-1, network.detections, 1])
    return _Selected(corners * placed, scores, chosen * exists, exists)


def _cut(layers: Any, levels: list[Tensor], boxes: Value, finest: int, bins: int) -> Tensor:
    """Returns the regions of boxes, each from its level; see `roi_align.roi_align` and `levels_of`."""
    share = Corners.of(boxes).area().apply("Sqrt") / (FINEST_SIDE * finest) + 1e-6
    share = share.apply("Max", 1.0).apply("Min", 2.0 ** (len(levels) - 2))
    cut = []
    for index, level in enumerate(levels[:-1]):
        here = (share >= 2.0**index).then("as_float")
        if index < len(levels) - 2:
            here = here * (share < 2.0 ** (index + 1)).then("as_float")
        within = Corners.of(boxes).each(functools.partial(_times, here)).stacked()
        cut.append(Value(layers, layers.regions(level, within.tensor, finest * 2**index, bins)))
    return functools.reduce(Value.__add__, cut).tensor


def _times(factor: Value, x: Value) -> Value:
    return x * factor


def _masks(network: MaskRCNN, layers: Any, regions: Tensor, classes: Value) -> Value:
    """Returns the probabilities of the masks; see `heads.MaskHead`."""
    head = "roi_head.mask_head"
    x = layers.reshape(regions, [-1, MASK_BINS, MASK_BINS, network.channels])
    for index in range(len(network.roi_head.mask_head.convs)):
        x = layers.relu(layers.conv(x, f"{head}.convs.{index}.conv"))
    x = layers.conv(layers.relu(layers.upsample(x, f"{head}.upsample")), f"{head}.conv_logits")
    of_class = Value(layers, layers.transpose(x, [0, 3, 1, 2]))
    chosen = classes.then("as_index").then("reshape", [-1, 1])
    logits = of_class.then("take", chosen.tensor)
    return logits.then("reshape", [-1, network.detections, MASK_SIDE, MASK_SIDE]).apply("Sigmoid")
