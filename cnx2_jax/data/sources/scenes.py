"""Generated scenes of handwritten digits with exact masks: dense prediction that needs no download."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.encoded_masks import encode_mask
from cnx2_jax.data.fields import Image, SegmentationMap
from cnx2_jax.data.sources.base import Source
from cnx2_jax.data.sources.digits import Digits, split_digits
from cnx2_jax.data.sources.objects import object_fields, object_reader
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

SIDE = 64
_TRAIN_RECORDS, _VAL_RECORDS = 8000, 400
_MOST_RECORDS = 100_000  # 1.6 GB of pixels
_SPLITS = ("train", "val")

_DIGITS = (2, 4)  # least and most per scene
_DIGIT_SIDES = (18, 32)  # pixels
_OVERLAP = 0.15  # the largest share of a digit's pixels that another one may cover
_PLACES = 8  # tries to place a digit; then it is left out
_INK = 7.0  # from this much ink on, of 16, a pixel belongs to the digit
_SOFT = 2.0  # ink over which a stroke fades in
# Digits are brighter than the ground. Where only their colours differ, a small network needs thousands of
# steps to tell one from the other before it begins to learn their shapes.
_GROUND = (25, 105)
_BRIGHT = (140, 255)
_STROKES = 4  # the most distractors


class Instance(NamedTuple):
    """A digit of a scene.

    Attributes:
      mask: bool [SIDE, SIDE], all pixels of the digit, also those that later digits cover.
      digit: 0 to 9.
    """

    mask: np.ndarray
    digit: int


class Scene(NamedTuple):
    """An image and the digits in it.

    Attributes:
      image: uint8 [SIDE, SIDE, 3].
      instances: in the order in which they are drawn, so the later of two covers the earlier.
    """

    image: np.ndarray
    instances: list[Instance]


def open_scenes(records: str, split: str) -> Source:
    """Opens scenes of digits; record i is a function of (split, i) alone.

    The digits are those of the same split of the source `digits`, so no digit of a val scene is in training.

    Args:
      records: what follows `scenes:` in `data.source`: their number; empty for 8,000, or 400 for val.
      split: "train" or "val".

    Raises:
      UserError: `records` is not a number from 1 to 100,000.
    """
    default = _VAL_RECORDS if split == "val" else _TRAIN_RECORDS
    count = int(records or default) if re.fullmatch(r"[0-9]{0,9}", records) else 0
    if not 1 <= count <= _MOST_RECORDS:
        raise UserError(
            f"data.source 'scenes:{records}' must be scenes or scenes:RECORDS, from 1 to {_MOST_RECORDS}"
        )
    digits = split_digits(split)
    scenes = [make_scene(digits, split, index) for index in range(count)]
    # Pixels are made here, where Python is needed, and encoded by TensorFlow's threads, which Python's lock
    # would hold up; without compression that takes microseconds.
    images = tf.constant(np.stack([scene.image for scene in scenes]))
    maps = tf.constant(np.stack([paint(scene) for scene in scenes])[..., None])
    annotations = annotate(scenes, digits.names)
    objects = object_reader(annotations)
    return Source(
        num_records=count,
        fields={
            "image": Image(),
            "map": SegmentationMap(("background", *digits.names)),
            **object_fields(annotations),
        },
        labels=None,
        # Of what is read, a graph runs only what the task takes.
        read=lambda index: {
            "image": tf.io.encode_png(images[index], compression=0),
            "map": tf.io.encode_png(maps[index], compression=0),
            **objects(index),
        },
        describe=lambda index: f"scenes/{split}/{index}",
        annotations=annotations,
    )


def make_scene(digits: Digits, split: str, index: int) -> Scene:
    """Returns scene number `index` of a split, drawn with the digits of that split."""
    rng = np.random.default_rng([_SPLITS.index(split), index])
    tone = rng.uniform(*_GROUND, (3, 1, 1)).astype(np.float32)
    canvas = tone + _texture(rng)
    for _ in range(rng.integers(0, _STROKES + 1)):
        _draw_stroke(canvas, rng)
    instances: list[Instance] = []
    for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
        chosen = int(rng.integers(len(digits.labels)))
        placed = _placed(digits.ink[chosen], [other.mask for other in instances], rng)
        if placed is None:
            continue
        ink, box = placed
        mask = np.zeros((SIDE, SIDE), bool)
        mask[box] = ink >= _INK
        instances.append(Instance(mask, int(digits.labels[chosen])))
        shade = np.clip((ink - _INK) / _SOFT + 0.5, 0, 1)  # half of it at the edge
        below = canvas[:, *box]
        below += shade * (rng.uniform(*_BRIGHT, (3, 1, 1)) - below)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(4, 14))
    image = np.clip(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Scene(np.ascontiguousarray(image), instances)


def paint(scene: Scene) -> np.ndarray:
    """Returns the class of each pixel, uint8 [SIDE, SIDE]: 0 for the ground, d + 1 for digit d."""
    classes = np.zeros((SIDE, SIDE), np.uint8)
    for instance in scene.instances:
        classes[instance.mask] = instance.digit + 1
    return classes


def annotate(scenes: Sequence[Scene], names: Sequence[str]) -> Annotations:
    """Returns the digits of scenes with the pixels that can be seen, without those that are wholly covered.

    Args:
      scenes: image i has the id i, and digit d the category d.
      names: of the digits.
    """
    starts, rows, classes, masks = [0], [], [], []
    for scene in scenes:
        covered = np.zeros((SIDE, SIDE), bool)
        for instance in reversed(scene.instances):
            visible = instance.mask & ~covered
            covered |= instance.mask
            if visible.any():
                (y, *_, y1), (x, *_, x1) = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
                rows.append((x, y, x1 + 1 - x, y1 + 1 - y, visible.sum()))
                classes.append(instance.digit)
                masks.append(encode_mask(visible))
        starts.append(len(rows))
    numbers = np.array(rows, np.float64).reshape(-1, 5)
    return Annotations(
        image_ids=np.arange(len(scenes)),
        sizes=np.full((len(scenes), 2), SIDE, np.int32),
        starts=np.array(starts),
        boxes=numbers[:, :4],
        areas=numbers[:, 4],
        classes=np.array(classes, np.int32),
        crowds=np.zeros(len(rows), bool),
        masks=np.array(masks, object),
        class_names=tuple(names),
        category_ids=np.arange(len(names)),
    )


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Returns smooth spots of two sizes, float32 [3, SIDE, SIDE], partly grey and partly coloured."""
    texture = np.zeros((3, SIDE, SIDE), np.float32)
    for cells, strength in ((4, 14), (12, 9)):
        spots = rng.standard_normal((3, cells, cells), np.float32) * np.float32(strength)
        spots = np.float32(0.7) * spots[:1] + np.float32(0.3) * spots
        scale = _linear(cells, SIDE)
        texture += scale @ spots @ scale.T
    return texture


def _draw_stroke(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Draws a thin, curved line, longer than any digit, right across the canvas."""
    along = np.arange(SIDE)
    bend = rng.uniform(-14, 14) * np.sin(along / SIDE * np.pi * rng.uniform(0.5, 2))
    across = np.round(rng.uniform(0, SIDE) + rng.uniform(-0.8, 0.8) * (along - SIDE / 2) + bend).astype(int)
    colour = rng.uniform(0, 255, (3, 1))
    rows, columns = (along, across) if rng.random() < 0.5 else (across, along)
    for row, column in ((rows, columns), (rows + 1, columns))[: rng.integers(1, 3)]:
        inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
        canvas[:, row[inside], column[inside]] = colour


def _placed(
    ink: np.ndarray, others: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[slice, slice]] | None:
    """Returns the scaled ink of a digit, float32 [h, w], and its place; None if it would cover too much."""
    height = int(rng.integers(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1))
    width = min(max(round(height * rng.uniform(0.8, 1.2)), _DIGIT_SIDES[0]), _DIGIT_SIDES[1])
    scaled = _linear(8, height) @ ink.astype(np.float32) @ _linear(8, width).T
    mask = scaled >= _INK
    for _ in range(_PLACES):
        top, left = int(rng.integers(SIDE - height + 1)), int(rng.integers(SIDE - width + 1))
        box = np.s_[top : top + height, left : left + width]
        if all((mask & other[box]).sum() <= _OVERLAP * min(mask.sum(), other.sum()) for other in others):
            return scaled, box
    return None


@functools.cache
def _linear(inputs: int, outputs: int) -> np.ndarray:
    """Returns the matrix of linear interpolation between the centres of pixels, float32 [outputs, inputs]."""
    centres = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(inputs)), 0).astype(np.float32)
