"""Images with their objects drawn over them: boxes, masks, names and scores."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from cnx2_jax.observe.grid import draw_grid
from cnx2_jax.observe.overlay import CELL, STRENGTH, palette, stacked

LINE = 2  # pixels, of a box
TEXT = 12


class Objects(NamedTuple):
    """Objects of an image.

    Attributes:
      boxes: y0, x0, y1, x1 in pixels.
      classes: indices of class names.
      masks: of the whole image; None draws boxes alone.
      scores: None for annotated objects.
    """

    boxes: Float[np.ndarray, "n 4"]
    classes: Int[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n height width"] | None = None
    scores: Float32[np.ndarray, " n"] | None = None


def draw_objects(
    image: UInt8[np.ndarray, "height width c"], objects: Objects, class_names: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws objects over an image in the colours of their classes, those with the highest scores on top."""
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    colours = palette(len(class_names))[objects.classes]
    order = np.arange(len(objects.boxes))
    if objects.scores is not None:
        order = np.argsort(objects.scores, kind="stable")
    painted = image.astype(np.float32)
    if objects.masks is not None:
        for row in order:
            mask = objects.masks[row]
            painted[mask] = (1 - STRENGTH) * painted[mask] + STRENGTH * colours[row]
    page = Image.fromarray(np.round(painted).astype(np.uint8))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for row in order:
        y0, x0, y1, x1 = objects.boxes[row].tolist()
        colour = tuple(colours[row].tolist())
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=LINE)
        text = class_names[objects.classes[row]]
        if objects.scores is not None:
            text += f" {objects.scores[row]:.2f}"
        place = (x0 + LINE, max(0, y0 - TEXT - 2))
        draw.rectangle(draw.textbbox(place, text, font), fill=colour)
        draw.text(place, text, fill=_legible(colours[row]), font=font)
    return np.asarray(page)


def draw_detections(
    rows: Sequence[tuple[np.ndarray, Objects, Objects]], class_names: Sequence[str]
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws images with their true and their detected objects side by side.

    Args:
      rows: image uint8 `[h, w, C]`, its annotated objects, and the detected ones.
      class_names: the name of each class.
    """
    cells: dict[str, list[np.ndarray]] = {"truth": [], "prediction": []}
    for image, *both in rows:
        height, width = image.shape[:2]
        factor = min(1, CELL / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        for name, objects in zip(cells, both, strict=True):
            drawn = Image.fromarray(draw_objects(image, objects, class_names))
            cells[name].append(np.asarray(drawn.resize(size, Image.Resampling.BILINEAR)))
    return draw_grid({name: stacked(pictures) for name, pictures in cells.items()})


def unfolded(
    crops: UInt8[np.ndarray, "n side side"], boxes: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> Bool[np.ndarray, "n height width"]:
    """Returns the masks of a training example, which are cropped to their boxes, in their image.

    Args:
      crops: 0 or 1.
      boxes: y0, x0, y1, x1 in whole pixels, inside the image.
      size: height and width of the image.
    """
    masks = np.zeros((len(crops), *size), bool)
    for mask, crop, box in zip(masks, crops, np.round(boxes).astype(int).tolist(), strict=True):
        y0, x0, y1, x1 = box
        rows, columns = (
            ((np.arange(length) + 0.5) * crop.shape[0] / max(length, 1)).astype(int)
            for length in (y1 - y0, x1 - x0)
        )
        mask[y0:y1, x0:x1] = crop[rows][:, columns] > 0
    return masks


def _legible(colour: UInt8[np.ndarray, "3"]) -> tuple[int, int, int]:
    """Returns black over bright colours and white over dark ones."""
    return (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 127 else (255, 255, 255)
