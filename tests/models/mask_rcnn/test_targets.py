"""Targets: what is drawn, and masks against those of whole images; tests/parity compares whole losses."""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS
from cnx2_jax.models.mask_rcnn.targets import Truth, mask_targets, roi_targets, rpn_targets

pytestmark = pytest.mark.usefixtures("compile_quickly")

CLASSES = 5
anchors_of = jax.jit(functools.partial(rpn_targets, count=12))
regions_of = jax.jit(functools.partial(roi_targets, count=16, num_classes=CLASSES))
masks_of = jax.jit(mask_targets)


def objects(present, masks=None):
    boxes = np.array([[10, 10, 40, 50], [0, 30, 25, 64], [30, 0, 64, 20]], np.float32)
    masks = np.ones((3, 8, 8), np.uint8) if masks is None else masks
    return Truth(*map(jnp.asarray, (boxes, np.array([2, 0, 4]), np.array(present), masks)))


def near(truth, rng, count):
    """Boxes around the objects."""
    boxes = np.asarray(truth.boxes)[rng.integers(0, 3, count)]
    return loops.ordered(boxes + rng.normal(0, 5, (count, 4)).astype(np.float32))


@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, False, False)])
def test_regions(present):
    """Objects are regions of their own; positive regions come first, with the right class and deltas."""
    rng = np.random.default_rng(0)
    truth, key = objects(present), jax.random.key(3)
    proposals, valid = near(truth, rng, 30), np.arange(30) < 25
    found = jax.tree.map(np.asarray, regions_of(key, proposals, valid, truth))
    boxes = np.concatenate([np.asarray(truth.boxes), proposals])
    matched = loops.match(proposals, valid, np.asarray(truth.boxes), present, 0.5, 0.5, None)
    matched = [i if exists else loops.IGNORED for i, exists in enumerate(present)] + matched
    draws = np.asarray(jax.random.uniform(key, (33,)))
    positive, negative = loops.sample(draws, matched, 16, 4)
    chosen = [*positive, *negative]
    assert found.valid.sum() == len(chosen) and found.positive.sum() == len(positive) == (
        4 if any(present) else 0
    )
    np.testing.assert_array_equal(found.boxes[: len(chosen)], boxes[chosen])
    assert not found.boxes[len(chosen) :].any()
    for place, index in enumerate(positive):
        target = truth.boxes[matched[index]]
        assert (
            found.classes[place] == truth.classes[matched[index]] and found.objects[place] == matched[index]
        )
        expected = loops.encode(np.float64(boxes[index]), np.float64(target), HEAD_STDS)
        np.testing.assert_allclose(found.deltas[place], expected, atol=1e-4)
    assert (found.classes[len(positive) :] == CLASSES).all()
    assert all(np.isfinite(x).all() for x in found)


def test_anchors_without_objects_are_negative():
    """And none is drawn from beyond the image."""
    rng = np.random.default_rng(1)
    truth = objects((False, False, False))
    valid = np.arange(40) % 2 == 0
    found = anchors_of(jax.random.key(0), near(truth, rng, 40), valid, truth)
    assert found.valid.all() and not found.positive.any() and valid[np.asarray(found.indices)].all()
    assert np.isfinite(found.deltas).all()


def test_masks_equal_those_of_the_whole_image():
    """Objects of 28 x 28 pixels, whose cropped masks are exact: equal but where the mean is next to 0.5."""
    rng = np.random.default_rng(2)
    crops = rng.integers(0, 2, (2, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
    corner = np.array([[12, 20], [33, 5]])
    whole = np.zeros((2, 70, 60))
    for mask, crop, (y, x) in zip(whole, crops, corner, strict=True):
        mask[y : y + 28, x : x + 28] = crop
    boxes = np.concatenate([corner, corner + 28], axis=1).astype(np.float32)
    truth = Truth(*map(jnp.asarray, (boxes, np.zeros(2, int), np.ones(2, bool), crops.astype(np.uint8))))
    index = np.arange(6) % 2
    regions = loops.ordered(boxes[index] + rng.uniform(-11, 11, (6, 4)).astype(np.float32))
    found = np.asarray(masks_of(regions, index, truth))
    assert set(np.unique(found)) == {0, 1}
    for region, which, mask in zip(regions, index, found, strict=True):
        np.testing.assert_array_equal(mask, loops.mask_target(whole[which], region))


def cropped(mask, box, side):
    """A mask's part in a box, resampled to side x side by the mean of 4 x 4 bilinear samples per cell."""
    rows, columns = (
        box[a] + (np.arange(4 * side) + 0.5) * (box[a + 2] - box[a]) / (4 * side) - 0.5 for a in range(2)
    )
    weights = [
        np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))
        for places, size in zip((rows, columns), mask.shape, strict=True)
    ]
    fine = weights[0] @ mask @ weights[1].T
    return fine.reshape(side, 4, side, 4).mean(axis=(1, 3)).astype(np.float32)


@pytest.mark.parametrize(("size", "share"), [(15, 0.02), (60, 0.006), (200, 0.003)])
def test_cropped_masks_lose_little(size, share):
    """Ellipses kept as 112 x 112 crops: the share of target pixels that differ from those of whole masks."""
    rng = np.random.default_rng(size)
    count = 3
    y, x = np.mgrid[: 2 * size, : 2 * size] + 0.5
    whole, boxes = [], []
    for _ in range(count):
        middle, radius = rng.uniform(0.9, 1.1, 2) * size, rng.uniform(0.3, 0.6, 2) * size
        inside = ((y - middle[0]) / radius[0]) ** 2 + ((x - middle[1]) / radius[1]) ** 2 <= 1
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        whole.append(inside)
        boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    boxes = np.float32(boxes)
    crops = np.stack([cropped(mask, box, 112) for mask, box in zip(whole, boxes, strict=True)])
    truth = Truth(*map(jnp.asarray, (boxes, np.zeros(count, int), np.ones(count, bool), crops)))
    regions = boxes + (rng.uniform(-0.15, 0.15, (count, 4)) * size).astype(np.float32)
    found = np.asarray(masks_of(regions, np.arange(count), truth))
    expected = [loops.mask_target(mask, region) for mask, region in zip(whole, regions, strict=True)]
    differing = (found != expected).mean()
    assert differing < share
