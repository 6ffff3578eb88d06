"""Colours for classes, and images with their segmentation maps drawn over them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from cnx2_jax.observe.grid import draw_grid

CELL = 256  # the longest side of an image in a grid
STRENGTH = 0.55  # of the colour over the image
UNLABELLED = (0, 0, 0)


def palette(classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Returns a colour for each class: those of PASCAL VOC, which any number of classes continues.

    Bit 0 of each group of three bits of the index is red, bit 1 green, bit 2 blue; the first group sets the
    highest bit of each colour. Class 0 would be black, so indices start at 1.
    """
    colours = np.zeros((classes, 3), np.uint8)
    for index in range(classes):
        rest = index + 1
        for bit in range(7, -1, -1):
            colours[index] |= np.array([(rest >> channel & 1) << bit for channel in range(3)], np.uint8)
            rest >>= 3
    return colours


def coloured(map: Integer[np.ndarray, "*any"], classes: int) -> UInt8[np.ndarray, "*any 3"]:
    """Returns a map in the colours of its classes; what is no class is black."""
    colours = np.vstack([palette(classes), np.array(UNLABELLED, np.uint8)])
    return colours[np.where((map >= 0) & (map < classes), map, classes)]


def overlay(
    image: UInt8[np.ndarray, "height width c"], map: Integer[np.ndarray, "height width"], classes: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image with the colours of a map over it; where the map has no class, the image alone."""
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    labelled = ((map >= 0) & (map < classes))[..., None]
    mixed = (1 - STRENGTH) * image + STRENGTH * coloured(map, classes)
    return np.where(labelled, np.round(mixed), image).astype(np.uint8)


def heat_overlay(
    image: UInt8[np.ndarray, "height width c"], heat: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image with a heat map over it: nothing at 0, then red, and yellow at the largest value.

    Args:
      image: of any size.
      heat: not negative, of any size; resized to the image by bilinear interpolation.
    """
    image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    size = image.shape[1], image.shape[0]
    whole = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    share = np.asarray(whole)[..., None] / max(float(heat.max()), 1e-30)
    colour = np.concatenate([np.full_like(share, 255), 255 * share, np.zeros_like(share)], axis=-1)
    strength = STRENGTH * np.sqrt(share)
    return np.round((1 - strength) * image + strength * colour).astype(np.uint8)


def draw_segmentations(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws images, their true maps and the predicted ones side by side.

    Args:
      rows: image uint8 `[h, w, C]`, true map `[H, W]` and predicted map `[H, W]`, all of any size.
      classes: how many there are.
    """
    cells: dict[str, list[np.ndarray]] = {"image": [], "truth": [], "prediction": []}
    for image, truth, predicted in rows:
        factor = min(1, CELL / max(truth.shape))
        size = max(1, round(truth.shape[1] * factor)), max(1, round(truth.shape[0] * factor))
        image = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
        pictures = image, coloured(truth, classes), coloured(predicted, classes)
        for name, picture in zip(cells, pictures, strict=True):
            smooth = Image.Resampling.BILINEAR if name == "image" else Image.Resampling.NEAREST
            cells[name].append(np.asarray(Image.fromarray(picture).resize(size, smooth)))
    return draw_grid({name: stacked(pictures) for name, pictures in cells.items()})


def stacked(pictures: Sequence[np.ndarray]) -> UInt8[np.ndarray, "n height width 3"]:
    """Stacks pictures of any size, padded with white at bottom and right."""
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    page = np.full((len(pictures), height, width, 3), 255, np.uint8)
    for place, picture in zip(page, pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture
    return page
