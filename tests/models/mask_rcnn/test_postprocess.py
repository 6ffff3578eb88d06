"""The choice of detections against a loop; tests/parity compares pasted masks with PyTorch's."""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models.mask_rcnn import paste_masks
from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS
from cnx2_jax.models.mask_rcnn.heads import BoxOutputs
from cnx2_jax.models.mask_rcnn.postprocess import select

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZE = np.array([60, 80], np.int32)
best = jax.jit(functools.partial(select, count=10))


@pytest.mark.parametrize(("valid", "offset"), [(15, 0), (15, -4), (3, 0), (0, 0)])
def test_detections(valid, offset):
    """Many, few and no scores above the threshold; only proposals that exist."""
    rng = np.random.default_rng(valid - offset)
    proposals = loops.ordered(rng.uniform(0, 60, (15, 4)).astype(np.float32))
    logits = rng.normal(0, 1, (15, 4)).astype(np.float32)
    logits[:, :3] += offset
    deltas = rng.normal(0, 1, (15, 3, 4)).astype(np.float32)
    exists = np.arange(15) < valid
    outputs = BoxOutputs(jnp.asarray(logits), jnp.asarray(deltas))
    found = jax.tree.map(np.asarray, best(outputs, proposals, exists, SIZE))

    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = np.where((scores > 0.05) & exists[:, None], scores, 0)[:, :3].T
    boxes = [
        [loops.decode(p, d[c], HEAD_STDS, SIZE) for p, d in zip(proposals, deltas, strict=True)]
        for c in range(3)
    ]
    expected = loops.soft_nms(np.float32(boxes), scores, 10, 0.5, 0.001)
    count = len(expected)
    assert count == {(15, 0): 10, (0, 0): 0}.get((valid, offset), count)
    np.testing.assert_array_equal(found.valid, np.arange(10) < count)
    np.testing.assert_array_equal(found.classes[:count], [c for c, _, _ in expected])
    np.testing.assert_allclose(found.scores[:count], [s for _, _, s in expected], rtol=1e-4)
    if count:
        np.testing.assert_allclose(found.boxes[:count], [boxes[c][i] for c, i, _ in expected], atol=1e-3)
    for array in (found.boxes, found.scores, found.classes):
        assert not array[count:].any()
    assert (np.diff(found.scores) <= 0).all()


def test_pasted_masks_fill_their_boxes():
    """A mask of ones covers the pixels whose centres are in the box, also where the image cuts it off."""
    boxes = np.float32([[2.4, 3.6, 7.5, 9.2], [-4, -3, 5, 4], [8, 8, 30, 30], [5, 5, 5, 5], [50, 2, 60, 9]])
    found = paste_masks(np.full((5, 28, 28), 0.999, np.float32), boxes, (12, 10))
    y, x = np.mgrid[:12, :10] + 0.5
    for covered, (y0, x0, y1, x1) in zip(found, boxes, strict=True):
        edge = (
            (np.abs(y - y0) < 0.5) | (np.abs(y - y1) < 0.5) | (np.abs(x - x0) < 0.5) | (np.abs(x - x1) < 0.5)
        )
        inside = (y > y0) & (y < y1) & (x > x0) & (x < x1)
        np.testing.assert_array_equal(covered[~edge], inside[~edge])
        assert not covered[~inside].any()
    assert not found[3:].any()


def test_half_a_mask():
    mask = np.zeros((1, 28, 28), np.float32)
    mask[:, :, 14:] = 1
    found = paste_masks(mask, np.float32([[0, 0, 8, 8]]), (8, 8))[0]
    np.testing.assert_array_equal(found, np.arange(8) >= np.full((8, 1), 4))
