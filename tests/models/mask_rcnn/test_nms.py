"""Suppression against greedy loops: ties, empty boxes, nothing at all; compiled once for any content."""

import functools

import detection_loops as loops
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnx2_jax.models.mask_rcnn.nms import nms, soft_nms

pytestmark = pytest.mark.usefixtures("compile_quickly")

GRID = st.integers(0, 5).map(lambda step: 10.0 * step)
hard = jax.jit(functools.partial(nms, threshold=0.5))
soft = jax.jit(functools.partial(soft_nms, count=10, threshold=0.5, lowest=0.01))


@settings(max_examples=80, deadline=None)
@given(
    arrays(np.float32, (16, 4), elements=GRID),
    arrays(np.float32, 16, elements=st.sampled_from([0.1, 0.25, 0.5, 0.9])),
    arrays(bool, 16),
)
def test_hard(raw, scores, valid):
    """With equal scores, equal boxes, overlaps of exactly one half, empty boxes, and missing ones."""
    boxes = loops.ordered(raw)
    found = np.asarray(hard(boxes, scores, valid))
    assert set(np.flatnonzero(found)) == set(loops.nms(boxes, scores, valid, 0.5))


@pytest.mark.parametrize("spread", [1, 5, 30])
def test_hard_with_long_chains(spread):
    """Boxes in a row, each overlapping its neighbours: as many rounds as there are boxes."""
    rng = np.random.default_rng(spread)
    start = np.arange(40, dtype=np.float32)[:, None] * 4 + rng.uniform(0, spread, (40, 1)).astype(np.float32)
    boxes = np.concatenate([0 * start, start, 0 * start + 10, start + 10], axis=1)[:, [0, 1, 2, 3]]
    for scores in (np.linspace(1, 0, 40, dtype=np.float32), rng.random(40, np.float32)):
        function = jax.jit(functools.partial(nms, threshold=0.3))
        found = np.asarray(function(boxes, scores, np.ones(40, bool)))
        assert set(np.flatnonzero(found)) == set(loops.nms(boxes, scores, np.ones(40, bool), 0.3))


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (3, 6, 4), elements=GRID),
    arrays(np.float32, (3, 6), elements=st.floats(0, 1, width=32).map(lambda x: x if x > 0.05 else 0.0)),
)
def test_soft(raw, scores):
    """Classes, boxes and lowered scores in the same order as mmcv's loop; empty places come last."""
    boxes = loops.ordered(raw)
    found = jax.tree.map(np.asarray, soft(boxes, scores))
    expected = loops.soft_nms(boxes, scores, 10, 0.5, 0.01)
    assert (found.scores > 0).sum() == len(expected)
    for place, (chosen, index, score) in enumerate(expected):
        assert (found.classes[place], found.indices[place]) == (chosen, index)
        assert found.scores[place] == pytest.approx(score, rel=1e-5)
    assert (found.scores[len(expected) :] == 0).all()


def test_one_program_for_any_content():
    """Nothing valid, everything valid: the same shapes, so nothing is compiled again."""
    function = jax.jit(functools.partial(nms, threshold=0.5))
    rng = np.random.default_rng(0)
    boxes = loops.ordered(rng.uniform(0, 50, (16, 4)).astype(np.float32))
    for valid in (np.zeros(16, bool), np.ones(16, bool)):
        assert np.asarray(function(boxes, rng.random(16, np.float32), valid)).any() == valid.any()
    assert function._cache_size() == 1
