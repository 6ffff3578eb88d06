"""Objects drawn over images: where, in which colour, in which order."""

import numpy as np
import pytest

from cnx2_jax.observe.objects import Objects, draw_detections, draw_objects, unfolded
from cnx2_jax.observe.overlay import palette

NAMES = ("cat", "dog")


def test_boxes_and_masks_are_drawn_where_they_are_in_the_colour_of_the_class():
    image = np.full((60, 80, 1), 100, np.uint8)
    masks = np.zeros((1, 60, 80), bool)
    masks[0, 30:40, 20:40] = True
    drawn = draw_objects(image, Objects(np.array([[25.0, 15, 50, 70]]), np.array([1]), masks), NAMES)
    colour = palette(2)[1]
    assert drawn.shape == (60, 80, 3) and drawn.dtype == np.uint8
    for y, x in ((25, 60), (49, 40), (40, 15), (40, 69)):
        np.testing.assert_array_equal(drawn[y, x], colour)
    assert (drawn[55:] == 100).all() and (drawn[45, 50] == 100).all()
    assert drawn[35, 30, 1] > 100 > drawn[35, 30, 0]


def test_higher_scores_are_drawn_on_top():
    image = np.zeros((40, 60, 3), np.uint8)
    boxes = np.array([[20.0, 10, 35, 50]] * 2)
    for scores, top in (([0.9, 0.2], 0), ([0.2, 0.9], 1)):
        drawn = draw_objects(image, Objects(boxes, np.array([0, 1]), scores=np.float32(scores)), NAMES)
        np.testing.assert_array_equal(drawn[34, 30], palette(2)[top])


@pytest.mark.parametrize("box", [[-5, -5, 3, 3], [0, 0, 0, 0], [10, 10, 200, 200]])
def test_boxes_beyond_the_image_are_drawn_as_far_as_they_go(box):
    drawn = draw_objects(np.zeros((20, 30, 3), np.uint8), Objects(np.float32([box]), np.array([0])), NAMES)
    assert drawn.shape == (20, 30, 3)


def test_a_grid_takes_images_of_different_sizes_and_without_objects():
    none = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros((0, 600, 100), bool), np.zeros(0, np.float32))
    one = Objects(np.array([[1.0, 2, 9, 8]]), np.array([0]))
    rows = [(np.zeros((20, 30, 3), np.uint8), one, one), (np.zeros((600, 100, 1), np.uint8), none, none)]
    grid = draw_detections(rows, NAMES)
    assert grid.dtype == np.uint8 and grid.shape[2] == 3 and grid.shape[0] > 2 * 256


def test_cropped_masks_are_put_back():
    crops = np.zeros((2, 4, 4), np.uint8)
    crops[0, :2] = 1
    masks = unfolded(crops, np.float32([[2, 3, 10, 7], [0, 0, 0, 0]]), (12, 9))
    expected = np.zeros((12, 9), bool)
    expected[2:6, 3:7] = True
    np.testing.assert_array_equal(masks[0], expected)
    assert not masks[1].any()
