"""Colours of classes, and maps drawn over images."""

import numpy as np

from cnx2_jax.observe.overlay import coloured, draw_segmentations, heat_overlay, overlay, palette


def test_colours_are_those_of_pascal_voc_and_all_different():
    """VOC's second to sixth colour, from its development kit."""
    first = [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)]
    np.testing.assert_array_equal(palette(5), first)
    assert len({tuple(colour) for colour in palette(255).tolist()}) == 255


def test_unlabelled_pixels_stay_as_they_are():
    image = np.full((2, 3, 1), 200, np.uint8)
    map = np.array([[0, 1, 255], [255, 255, 255]], np.uint8)
    drawn = overlay(image, map, 2)
    assert drawn.shape == (2, 3, 3)
    assert (drawn[1] == 200).all() and (drawn[0, 2] == 200).all()
    assert drawn[0, 0, 0] > drawn[0, 0, 1] and drawn[0, 1, 1] > drawn[0, 1, 0]
    assert (coloured(map, 2)[1] == 0).all()


def test_a_grid_takes_rows_of_different_sizes():
    rng = np.random.default_rng(0)
    rows = []
    for height, width in ((20, 30), (600, 100)):
        maps = rng.integers(0, 3, (2, height, width))
        rows.append((rng.integers(0, 256, (height // 2, width // 2, 3), np.uint8), *maps))
    grid = draw_segmentations(rows, 3)
    assert grid.dtype == np.uint8 and grid.shape[2] == 3
    assert grid.shape[0] > 2 * 256


def test_heat_is_strongest_at_its_largest_value_and_leaves_the_rest():
    image = np.full((6, 8, 1), 100, np.uint8)
    drawn = heat_overlay(image, np.float32([[0, 0], [0, 5]]))
    assert drawn.shape == (6, 8, 3)
    assert (drawn[0, 0] == 100).all()
    red = drawn[..., 0].astype(int)
    assert red.max() == red[-1, -1] > 150 and drawn[-1, -1, 2] < 100
    assert (heat_overlay(image, np.zeros((2, 2), np.float32)) == 100).all()  # nothing raises the output
