"""Labelled grids: every pixel is at its place."""

import numpy as np
import pytest

from cnx2_jax.observe.grid import GAP, HEADER, LEAST_SIDE, draw_grid, draw_sheet


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


def test_sheet_has_images_in_rows_with_captions_below():
    values = images(5, 100, 120, 3)
    captions = ["cat", "dog", "", "a caption that is far too long for its image", "ox"]
    sheet = draw_sheet(values, captions, columns=3)
    assert sheet.shape == (GAP + 2 * (100 + HEADER + GAP), GAP + 3 * (120 + GAP), 3)
    inked = []
    for index, value in enumerate(values):
        top, left = GAP + index // 3 * (100 + HEADER + GAP), GAP + index % 3 * (120 + GAP)
        np.testing.assert_array_equal(sheet[top : top + 100, left : left + 120], value)
        inked.append((sheet[top + 100 : top + 100 + HEADER, left : left + 120] < 255).any())
        # What is too long is cut off, and does not run into the gap.
        assert (sheet[top + 100 : top + 100 + HEADER, left + 120 : left + 120 + GAP] == 255).all()
    assert inked == [True, True, False, True, True]
    assert (sheet[GAP + 100 + HEADER + GAP :, GAP + 2 * (120 + GAP) :] == 255).all()  # no sixth


def test_sheet_enlarges_small_images_of_one_channel():
    values = images(2, 8, 12, 1)
    sheet = draw_sheet(values, ["1", "2"], columns=2)
    big = values.repeat(12, axis=1).repeat(12, axis=2).repeat(3, axis=3)
    np.testing.assert_array_equal(sheet[GAP : GAP + 96, GAP : GAP + 144], big[0])
