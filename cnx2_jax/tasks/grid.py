"""A labelled grid of images to look at."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 96  # smaller images are enlarged by a whole factor, so that their pixels stay pixels
GAP = 4
HEADER = 20
TEXT = 13


def draw_grid(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Draws named columns of images side by side.

    Args:
      columns: uint8 `[N, H, W, C]` by name, all of one shape. Three channels are shown in colour, any other
        count by its first channel in grey.

    Returns:
      uint8 `[H', W', 3]`: a row per image, under a line of names.
    """
    images = np.stack(list(columns.values()), axis=1)  # N, columns, H, W, C
    images = images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)
    factor = max(1, -(-LEAST_SIDE // min(images.shape[2:4])))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
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
