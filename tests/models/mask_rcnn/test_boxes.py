"""Boxes against loops over them, and what holds for all of them."""

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS, RPN_STDS, area, clip, decode, encode, iou

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZE = np.array([60, 90], np.int32)
# Half of the corners lie on a coarse grid, so that boxes touch, coincide, are empty, and reach the border.
CORNERS = st.one_of(
    st.integers(-2, 14).map(lambda step: 8.0 * step), st.floats(-20, 110, width=32, allow_subnormal=False)
)
RAW = arrays(np.float32, (6, 4), elements=CORNERS)


@jax.jit
def overlaps(first, second):
    return iou(first, second), iou(second, first), iou(first, first), area(first)


@jax.jit
def coded(anchors, boxes, deltas):
    """Deltas, decoded boxes, and the gradient of the latter's sum in the deltas."""
    decoded, backward = jax.vjp(lambda d: decode(anchors, d, HEAD_STDS, jnp.asarray(SIZE)), deltas)
    return encode(anchors, boxes, HEAD_STDS), decoded, backward(jnp.ones_like(decoded))[0]


def random_boxes(rng, count):
    return loops.ordered(rng.uniform(0, 60, (count, 4)).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(RAW, RAW)
def test_overlaps(first, second):
    """Equal to a loop; symmetric, from 0 to 1, 1 with itself unless empty; empty boxes overlap nothing."""
    first, second = loops.ordered(first), loops.ordered(second)
    found, reverse, diagonal, areas = map(np.asarray, overlaps(first, second))
    expected = [[loops.iou(a, b) for b in second] for a in first]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()
    np.testing.assert_allclose(found, reverse.T, rtol=1e-6)
    assert (found[areas == 0] == 0).all()
    np.testing.assert_allclose(diagonal.diagonal()[areas > 1e-3], 1, rtol=1e-5)


def test_boxes_with_corners_in_the_wrong_order_are_empty():
    assert float(area(jnp.asarray([5.0, 5.0, 3.0, 9.0]))) == 0


@pytest.mark.parametrize("stds", [RPN_STDS, HEAD_STDS])
def test_deltas(stds):
    """Equal to a loop in float64, and decoding inverts encoding."""
    rng = np.random.default_rng(0)
    anchors, boxes = random_boxes(rng, 50), random_boxes(rng, 50)
    found = np.asarray(encode(jnp.asarray(anchors), jnp.asarray(boxes), stds))
    wide = np.float64(anchors), np.float64(boxes)
    expected = [loops.encode(a, b, stds) for a, b in zip(*wide, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    within = np.abs(found[:, 2:] * stds[2]).max(axis=1) < 4
    back = np.asarray(decode(jnp.asarray(anchors), jnp.asarray(found), stds, jnp.asarray(SIZE)))
    np.testing.assert_allclose(back[within], boxes[within], atol=2e-4)


def test_decoding_clamps_sides_and_clips_corners():
    rng = np.random.default_rng(1)
    anchors = random_boxes(rng, 60)
    deltas = rng.normal(0, 20, (60, 4)).astype(np.float32)
    found = decode(jnp.asarray(anchors), jnp.asarray(deltas), HEAD_STDS, jnp.asarray(SIZE))
    expected = [loops.decode(np.float64(a), d, HEAD_STDS, SIZE) for a, d in zip(anchors, deltas, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
    assert (np.asarray(found) == 0).any() and (np.asarray(found)[:, 2] == SIZE[0]).any(), (
        "nothing was clipped"
    )


@settings(max_examples=60, deadline=None)
@given(RAW, RAW, arrays(np.float32, (6, 4), elements=st.floats(-1e4, 1e4, width=32)))
def test_no_box_gives_a_value_that_is_not_finite(anchors, boxes, deltas):
    """Empty anchors and boxes too, and the gradient in the deltas."""
    encoded, decoded, gradient = map(np.asarray, coded(loops.ordered(anchors), loops.ordered(boxes), deltas))
    assert np.isfinite(encoded).all() and np.isfinite(decoded).all() and np.isfinite(gradient).all()
    assert (decoded >= 0).all() and (decoded <= np.tile(SIZE, 2)).all()


def test_clipping_leaves_what_is_inside():
    boxes = np.array([[-5, -5, 70, 95], [1, 2, 3, 4], [60, 90, 61, 91]], np.float32)
    np.testing.assert_array_equal(
        clip(jnp.asarray(boxes), jnp.asarray(SIZE)), [[0, 0, 60, 90], [1, 2, 3, 4], [60, 90, 60, 90]]
    )
