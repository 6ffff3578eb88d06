"""Anchors: boxes of three shapes around every position of a map; values and order are mmdetection's."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SCALE = 8  # side of a square anchor, in strides
RATIOS = (0.5, 1.0, 2.0)  # height / width


def grid_anchors(grid: tuple[int, int], stride: int) -> Float[Array, "n 4"]:
    """Returns the anchors of a map, by row, column and ratio: float32 `[rows * columns * 3, 4]`.

    An anchor's centre is the top left corner of its position's cell.

    Args:
      grid: rows and columns of the map.
      stride: pixels from one position to the next.
    """
    ratios = np.sqrt(np.asarray(RATIOS, np.float32))
    height = np.float32(stride) * ratios * np.float32(SCALE)
    width = np.float32(stride) * (np.float32(1) / ratios) * np.float32(SCALE)
    around = np.stack([-height, -width, height, width], axis=-1) * np.float32(0.5)
    y = jnp.arange(grid[0], dtype=jnp.float32)[:, None, None] * stride
    x = jnp.arange(grid[1], dtype=jnp.float32)[None, :, None] * stride
    corners = [(x if axis % 2 else y) + around[:, axis] for axis in range(4)]
    return jnp.stack(jnp.broadcast_arrays(*corners), axis=-1).reshape(-1, 4)


def inside(grid: tuple[int, int], stride: int, size: Int[Array, "*b 2"]) -> Bool[Array, "*b rows columns"]:
    """Returns which positions of a map have a cell that begins inside an image of this height and width."""
    rows = jnp.arange(grid[0]) * stride < size[..., :1]
    columns = jnp.arange(grid[1]) * stride < size[..., 1:]
    return rows[..., :, None] & columns[..., None, :]


def valid_anchors(grid: tuple[int, int], stride: int, size: Int[Array, "*b 2"]) -> Bool[Array, "*b n"]:
    """Returns which anchors belong to positions inside an image of this height and width; see `inside`."""
    positions = inside(grid, stride, size).reshape(*size.shape[:-1], -1)
    return jnp.repeat(positions, len(RATIOS), axis=-1)
