"""The labelled grid: every pixel where it belongs."""

import numpy as np
import pytest

from cnx2_jax.tasks.grid import GAP, HEADER, LEAST_SIDE, draw_grid


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def cell(grid, row, column, height, width):
    top, left = HEADER + row * (height + GAP), GAP + column * (width + GAP)
    return grid[top : top + height, left : left + width]


def test_large_images_keep_their_size():
    columns = {"original": images(2, 100, 128, 3), "other": images(2, 100, 128, 3, seed=1)}
    grid = draw_grid(columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (HEADER + 2 * (100 + GAP), GAP + 2 * (128 + GAP), 3)
    for column, values in enumerate(columns.values()):
        for row in range(2):
            np.testing.assert_array_equal(cell(grid, row, column, 100, 128), values[row])


@pytest.mark.parametrize(("height", "width", "factor"), [(32, 32, 3), (40, 64, 3), (8, 95, 12), (96, 96, 1)])
def test_small_images_are_enlarged_by_whole_pixels(height, width, factor):
    values = images(1, height, width, 3)
    grid = draw_grid({"a": values})
    height, width = factor * height, factor * width
    assert min(height, width) >= LEAST_SIDE
    shown = cell(grid, 0, 0, height, width)
    for down in range(factor):
        np.testing.assert_array_equal(shown[down::factor, ::factor], values[0])
        np.testing.assert_array_equal(shown[::factor, down::factor], values[0])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channel_counts_are_grey(channels):
    values = images(1, 96, 96, channels)
    shown = cell(draw_grid({"a": values}), 0, 0, 96, 96)
    for channel in range(3):
        np.testing.assert_array_equal(shown[..., channel], values[0, ..., 0])


def test_names_stand_above_their_columns_and_nothing_between_images():
    black = np.zeros((1, 96, 96, 3), np.uint8)
    grid = draw_grid({"original": black, "": black})
    header = grid[:HEADER]
    assert header[:, GAP : GAP + 96].min() == 0  # letters
    assert header[:, GAP + 96 + GAP :].min() == 255  # no name, no letters
    assert (grid[HEADER:, GAP + 96 : GAP + 96 + GAP] == 255).all()
    assert (grid[HEADER + 96 :] == 255).all()
    assert (grid[:, :GAP] == 255).all()
