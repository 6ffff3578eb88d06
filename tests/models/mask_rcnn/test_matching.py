"""The assignment against loops over boxes and objects."""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnx2_jax.models.mask_rcnn.matching import IGNORED, NEGATIVE, match

pytestmark = pytest.mark.usefixtures("compile_quickly")

RPN = {"positive": 0.7, "negative": 0.3, "lowest": 0.3}
HEAD = {"positive": 0.5, "negative": 0.5, "lowest": None}
# A coarse grid: many boxes have equal overlaps with an object, or coincide.
GRID = st.integers(0, 6).map(lambda step: 10.0 * step)


@functools.cache
def compiled(rpn):
    return jax.jit(functools.partial(match, **(RPN if rpn else HEAD)))


@pytest.mark.parametrize("rpn", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    boxes=arrays(np.float32, (12, 4), elements=GRID),
    objects=arrays(np.float32, (4, 4), elements=GRID),
    valid=arrays(bool, 12),
    present=arrays(bool, 4),
)
def test_assignment(rpn, boxes, objects, valid, present):
    """With ties, empty boxes, missing boxes and missing objects, up to none at all."""
    boxes, objects = loops.ordered(boxes), loops.ordered(objects)
    found = compiled(rpn)(boxes, valid, objects, present)
    options = RPN if rpn else HEAD
    expected = loops.match(boxes, valid, objects, present, *options.values())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rpn", [True, False])
def test_random_boxes(rpn):
    """Boxes near objects, so that all outcomes occur."""
    rng = np.random.default_rng(0)
    objects = loops.ordered(rng.uniform(0, 100, (5, 4)).astype(np.float32))
    objects[:, 2:] += 20
    near = objects[rng.integers(0, 5, 60)] + rng.normal(0, 6, (60, 4)).astype(np.float32)
    boxes = loops.ordered(np.concatenate([near, rng.uniform(0, 100, (20, 4)).astype(np.float32)]))
    valid, present = np.ones(80, bool), np.array([True] * 4 + [False])
    found = np.asarray(compiled(rpn)(boxes, valid, objects, present))
    options = RPN if rpn else HEAD
    np.testing.assert_array_equal(found, loops.match(boxes, valid, objects, present, *options.values()))
    assert (found == NEGATIVE).any() and (found >= 0).any() and (found == IGNORED).any() == rpn


def test_an_object_without_a_good_box_gets_its_best_one():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]], np.float32)
    objects = np.array([[0, 0, 10, 20], [0, 0, 10, 90]], np.float32)
    found = compiled(True)(boxes, np.ones(3, bool), objects, np.ones(2, bool))
    np.testing.assert_array_equal(found, [IGNORED, 0, NEGATIVE])  # 0.55; the second object has 0.12 at best


def test_no_place_for_objects():
    boxes = jnp.zeros((3, 4))
    found = compiled(True)(boxes, jnp.ones(3, bool), jnp.zeros((1, 4)), jnp.zeros(1, bool))
    assert (found == NEGATIVE).all()
