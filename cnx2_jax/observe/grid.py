"""Draws labelled grids of images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 96  # smaller images are enlarged by an integer factor, which keeps their pixels sharp
GAP = 4
HEADER = 20
TEXT = 13


def draw_grid(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Draws named columns of images side by side.

    Args:
      columns: uint8 `[N, H, W, C]` by name, all of the same shape. Images of three channels are drawn in
        colour, others by their first channel in grey.

    Returns:
      uint8 `[H', W', 3]`: one row per image below a line of names.
    """
    images = _shown(np.stack(list(columns.values()), axis=1))  # N, columns, H, W, C
    rows, count, height, width, _ = images.shape
    page = Image.new(
        "RGB", (GAP + count * (width + GAP), HEADER + rows * (height + GAP)), color=(255, 255, 255)
    )
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for column, name in enumerate(columns):
        left = GAP + column * (width + GAP)
        draw.text((left, (HEADER - TEXT) // 2), name, fill=(0, 0, 0), font=font)
        for row in range(rows):
            page.paste(Image.fromarray(images[row, column]), (left, HEADER + row * (height + GAP)))
    return np.asarray(page)


def draw_sheet(images: np.ndarray, captions: Sequence[str], columns: int) -> np.ndarray:
    """Draws images in rows, each with a caption below it.

    Args:
      images: uint8 `[N, H, W, C]`, drawn as by `draw_grid`.
      captions: N captions; one that is wider than its image is cut off.
      columns: images per row.

    Returns:
      uint8 `[H', W', 3]`.
    """
    images = _shown(images)
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    size = (GAP + columns * (width + GAP), GAP + rows * (height + HEADER + GAP))
    page = Image.new("RGB", size, color=(255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = GAP + index % columns * (width + GAP)
        top = GAP + index // columns * (height + HEADER + GAP)
        page.paste(Image.fromarray(image), (left, top))
        while draw.textlength(caption, font) > width:
            caption = caption[:-2] + "…" if len(caption) > 2 else ""
        draw.text((left, top + height + 1), caption, fill=(0, 0, 0), font=font)
    return np.asarray(page)


def _shown(images: np.ndarray) -> np.ndarray:
    """Returns images `[..., H, W, C]` with three channels, enlarged if they are small."""
    images = images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)
    factor = max(1, -(-LEAST_SIDE // min(images.shape[-3:-1])))
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
