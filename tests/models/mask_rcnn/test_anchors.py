"""Anchors against mmdetection's values, and which of them are valid."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models.mask_rcnn.anchors import grid_anchors, inside, valid_anchors

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Scale 8 at stride 16: areas of 128 x 128, heights of 1/2, 1 and 2 widths; as x0, y0, x1, y1.
STRIDE_16 = [
    [-90.5097, -45.2548, 90.5097, 45.2548],
    [-64.0, -64.0, 64.0, 64.0],
    [-45.2548, -90.5097, 45.2548, 90.5097],
]


def literal(rows, columns, stride):
    """One anchor at a time."""
    found = []
    for row in range(rows):
        for column in range(columns):
            for ratio in (0.5, 1, 2):
                height, width = 8 * stride * ratio**0.5, 8 * stride / ratio**0.5
                y, x = row * stride, column * stride
                found.append([y - height / 2, x - width / 2, y + height / 2, x + width / 2])
    return found


def test_base_anchors():
    found = np.asarray(grid_anchors((1, 1), 16))
    np.testing.assert_allclose(found[:, [1, 0, 3, 2]], STRIDE_16, atol=1e-4)
    assert found.dtype == np.float32


@pytest.mark.parametrize(("rows", "columns", "stride"), [(3, 5, 4), (1, 2, 64), (2, 2, 8)])
def test_order_and_values(rows, columns, stride):
    found = grid_anchors((rows, columns), stride)
    np.testing.assert_allclose(found, literal(rows, columns, stride), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 96), (32, 160)])
def test_anchors_beyond_the_image_are_invalid(size):
    """mmdetection's `valid_flags`: the first ceil(side / stride) rows and columns, on every level."""
    for stride in (4, 32, 64):
        grid = -(-128 // stride), -(-160 // stride)
        rows, columns = (-(-side // stride) for side in size)
        found = np.asarray(valid_anchors(grid, stride, jnp.asarray(size))).reshape(*grid, 3)
        assert found[:rows, :columns].all() and found.sum() == rows * columns * 3
        both = inside(grid, stride, jnp.asarray([size, (128, 160)]))
        np.testing.assert_array_equal(both[0], found[..., 0])
        assert both[1].all()
