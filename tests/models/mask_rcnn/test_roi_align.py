"""RoIAlign against a loop over samples, and its gradient; tests/parity compares it with onnxruntime."""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnx2_jax.models.mask_rcnn.roi_align import axis_weights, levels_of, roi_align

pytestmark = pytest.mark.usefixtures("compile_quickly")

# A stride of 1 on the finest map, so that small maps have regions of all levels.
align = jax.jit(functools.partial(roi_align, finest=1, bins=3))
FULL = np.array([[48, 80]], np.int32)


def maps(rng, batch=1, dtype=np.float32):
    return [rng.standard_normal((batch, 48 >> i, 80 >> i, 2)).astype(dtype) for i in range(3)]


@functools.cache
def weights(clamped):
    def run(start, length, samples, limit):
        return axis_weights(start, length, samples, 3, 9, limit if clamped else None)

    return jax.jit(run)


@pytest.mark.parametrize("clamped", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    start=arrays(np.float64, 8, elements=st.floats(-14.3, 12.3)),
    length=arrays(np.float64, 8, elements=st.floats(0, 25).map(lambda x: x if x > 0.01 else 0.0)),
    samples=arrays(np.int8, 8, elements=st.integers(0, 11)),
    limit=arrays(np.int8, 8, elements=st.integers(1, 9)),
)
def test_weights_of_an_axis(clamped, start, length, samples, limit):
    """Sample by sample in float64; regions outside and empty ones too."""
    with jax.enable_x64(True):
        found = np.asarray(weights(clamped)(start, length, samples.astype(float), limit.astype(float)))
    for region in range(8):
        expected, edge = np.zeros((3, 9)), False
        for bin in range(3):
            for i in range(samples[region]):
                width = length[region] / 3
                place = start[region] + bin * width + (i + 0.5) * width / samples[region]
                size = limit[region] if clamped else 9
                edge |= min(abs(place + 1), abs(place - size)) < 1e-9
                if clamped and not -1 <= place <= size:
                    continue
                place = min(max(place, 0), size - 1) if clamped else place
                expected[bin] += np.maximum(0, 1 - abs(place - np.arange(9))) / samples[region]
        if length[region] and not edge:  # at the very edge rounding decides whether a sample counts
            np.testing.assert_allclose(found[region], expected, atol=1e-11)
        assert np.isfinite(found).all()


def test_regions_equal_a_loop():
    """Float64: every level, regions across the border of an image smaller than the canvas, empty ones."""
    rng = np.random.default_rng(0)
    boxes = loops.ordered(rng.uniform(-7, 90, (1, 30, 4)))
    boxes[0, :3, 2:] = boxes[0, :3, :2]
    boxes[0, 3:15] *= 0.4
    sizes = np.array([[40, 64]], np.int32)
    with jax.enable_x64(True):
        pyramid = maps(rng, dtype=np.float64)
        found = np.asarray(align(pyramid, boxes, sizes))[0]
        levels = np.asarray(levels_of(jnp.asarray(boxes[0]), 1, 3))
    assert set(levels) == {0, 1, 2}
    for box, level, region in zip(boxes[0], levels, found, strict=True):
        expected = loops.roi_align(pyramid[level][0], box / 2**level, 3, sizes[0] // 2**level)
        np.testing.assert_allclose(region, expected, atol=1e-11)


def test_levels():
    """Constants of the paper: 112 pixels square is the first of P3, 224 of P4, and so on up to P5."""
    sides = [(10, 10), (111, 111), (112, 112), (223, 223), (224, 224), (448, 448), (2000, 2000), (800, 15.5)]
    boxes = jnp.asarray([(0, 0, *side) for side in sides], jnp.float32)
    np.testing.assert_array_equal(levels_of(boxes, 4, 4), [0, 0, 1, 1, 2, 3, 3, 0])
    assert int(levels_of(jnp.zeros(4), 4, 4)) == 0


def test_gradient_in_the_maps():
    """Equal to finite differences in float64, and none for the boxes."""
    rng = np.random.default_rng(1)
    boxes = loops.ordered(rng.uniform(-5, 80, (1, 30, 4)))
    with jax.enable_x64(True):
        pyramid = [jnp.asarray(x) for x in maps(rng, dtype=np.float64)]
        direction = [jnp.asarray(x) for x in maps(rng, dtype=np.float64)]
        scalar = jax.jit(lambda pyramid, boxes: jnp.sin(align(pyramid, boxes, FULL)).sum())
        gradients, of_boxes = jax.jit(jax.grad(scalar, argnums=(0, 1)))(pyramid, boxes)
        step = 1e-5
        moved = [
            scalar([x + sign * step * d for x, d in zip(pyramid, direction, strict=True)], boxes)
            for sign in (1, -1)
        ]
        expected = float(moved[0] - moved[1]) / (2 * step)
        found = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert found == pytest.approx(expected, rel=1e-7)
    assert not np.asarray(of_boxes).any()


def test_more_regions_than_one_product_takes():
    """The last product is smaller; images of a batch do not see each other."""
    rng = np.random.default_rng(2)
    pyramid = maps(rng, batch=2)
    boxes = loops.ordered(rng.uniform(0, 60, (2, 70, 4)).astype(np.float32))
    sizes = np.array([[48, 80], [32, 64]], np.int32)
    together = align(pyramid, boxes, sizes)
    alone = align([x[1:] for x in pyramid], boxes[1:, 60:], sizes[1:])
    np.testing.assert_allclose(together[1, 60:], alone[0], atol=1e-6)


def test_bfloat16_maps_give_bfloat16(error):
    rng = np.random.default_rng(3)
    pyramid, boxes = maps(rng), loops.ordered(rng.uniform(0, 60, (1, 10, 4)).astype(np.float32))
    wide = align(pyramid, boxes, FULL)
    narrow = align([jnp.asarray(x, jnp.bfloat16) for x in pyramid], boxes, FULL)
    assert narrow.dtype == jnp.bfloat16 and error(narrow, wide) < 0.02
