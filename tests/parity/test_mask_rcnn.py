"""Mask R-CNN against PyTorch and onnxruntime with the same weights, in parts and as a whole.

The twin sees each image padded to multiples of 32 alone, as mmdetection's test does; ours sees both on one
larger canvas.
"""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_rcnn_twin import COUNTS, DETECTIONS, OPTIONS, Twin, functional, operator, theirs_aligned, torch

from cnx2_jax.models import EncoderConfig, MaskRCNN
from cnx2_jax.models.mask_rcnn import Truth, paste_masks
from cnx2_jax.models.mask_rcnn.model import ANCHOR_STREAM, REGION_STREAM
from cnx2_jax.models.mask_rcnn.nms import nms
from cnx2_jax.models.mask_rcnn.roi_align import roi_align

pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.slow]

SIZES = np.array([[90, 120], [50, 100]], np.int32)
CANVAS = (96, 128)
SMALL = EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32))
MOST = 4  # places for objects
BOUND = 1e-5  # largest absolute difference over largest absolute value, in float32


def edge_samples(boxes, stride, bins, size):
    """Whether a sample of a region lies where rounding decides if it is outside of the map."""
    found = np.zeros(len(boxes), bool)
    for row, box in enumerate(np.float64(boxes) / stride):
        for axis in range(2):
            length = box[axis + 2] - box[axis]
            count = bins * max(int(np.ceil(length / bins)), 1)
            places = box[axis] - 0.5 + (np.arange(count) + 0.5) * length / count
            found[row] |= min(abs(places + 1).min(), abs(places - size[axis]).min()) < 1e-4
    return found


@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align(bins, error):
    """Regions within, across, and outside of the border, empty ones, with corners on and off the grid.

    Both round the samples' positions in float32, which alone moves the results by 2e-6.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 24, 40, 5)).astype(np.float32)
    size = np.array([[96, 160]], np.int32)
    align = jax.jit(functools.partial(roi_align, finest=4, bins=bins))
    for grid in (0, 1, 4):
        corners = rng.uniform(-20, 120, (200, 4)).astype(np.float32)
        boxes = loops.ordered(np.round(corners / grid) * grid if grid else corners)
        boxes[:5, 2:] = boxes[:5, :2]
        boxes[5:9, 2] = boxes[5:9, 0]
        boxes = boxes[~edge_samples(boxes, 4, bins, (24, 40))]
        assert len(boxes) > 150
        found = align([jnp.asarray(x)], boxes[None], size)[0]
        expected = theirs_aligned(x.transpose(0, 3, 1, 2), boxes, 4, bins).transpose(0, 2, 3, 1)
        assert error(found, expected) < 5e-6


def test_nms():
    """Random boxes, equal scores, equal boxes, empty boxes, and none."""
    run = operator("NonMaxSuppression", "ffiff", "i")
    ours = jax.jit(functools.partial(nms, threshold=0.5))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        boxes = loops.ordered(rng.integers(0, 7 + 9 * seed, (60, 4)).astype(np.float32))
        scores = (rng.integers(1, 20, 60) / 20).astype(np.float32)
        valid = np.full(60, seed != 5)
        limits = np.int64([60]), np.float32([0.5]), np.float32([0 if seed != 5 else 1])
        kept = run(boxes[None], scores[None, None], *limits)[:, 2]
        assert set(np.flatnonzero(ours(boxes, scores, valid))) == set(kept), seed


def test_paste_masks():
    """grid_sample over the whole image, also of boxes that are cut off or empty."""
    rng = np.random.default_rng(0)
    height, width = 61, 83
    boxes = loops.ordered(rng.uniform(-10, 90, (40, 4)).astype(np.float32))
    boxes[0] = [0, 0, height, width]
    boxes[1] = [10, 10, 38, 38]
    masks = rng.uniform(0, 1, (40, 28, 28)).astype(np.float32)
    masks[20:] = 1
    y = (torch.arange(height) + 0.5 - torch.tensor(boxes[:, :1])) / torch.tensor(boxes[:, 2:3] - boxes[:, :1])
    x = (torch.arange(width) + 0.5 - torch.tensor(boxes[:, 1:2])) / torch.tensor(boxes[:, 3:] - boxes[:, 1:2])
    grid = torch.stack(
        [2 * x[:, None].expand(-1, height, -1) - 1, 2 * y[:, :, None].expand(-1, -1, width) - 1], dim=-1
    )
    values = functional.grid_sample(torch.tensor(masks)[:, None], grid, align_corners=False)[:, 0].numpy()
    found = paste_masks(masks, boxes, (height, width))
    clear = np.abs(values - 0.5) > 1e-4  # not rounding's choice
    assert (found == (values >= 0.5))[clear].all() and clear.mean() > 0.99 and found.any()
    assert not paste_masks(masks[:1], np.zeros((1, 4), np.float32), (height, width)).any()


@pytest.fixture(scope="module")
def model(build):
    return build(MaskRCNN, SMALL, detections=DETECTIONS, **OPTIONS, **COUNTS)


@pytest.fixture(scope="module")
def images():
    """Both images on one canvas, and each alone, padded to multiples of 32."""
    rng = np.random.default_rng(0)
    canvas = np.zeros((2, *CANVAS, 3), np.float32)
    for image, (height, width) in zip(canvas, SIZES, strict=True):
        image[:height, :width] = rng.standard_normal((height, width, 3))
    rounded = -(-SIZES // 32) * 32
    return canvas, [image[:height, :width] for image, (height, width) in zip(canvas, rounded, strict=True)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def test_heads(model, error):
    """The logits and deltas of random regions; one mask per region of those that PyTorch computes for all."""
    twin, rng = Twin(model), np.random.default_rng(3)
    regions = [
        rng.standard_normal((1, 9, bins, bins, OPTIONS["channels"])).astype(np.float32) for bins in (7, 14)
    ]
    theirs = [torch.tensor(x[0].transpose(0, 3, 1, 2)) for x in regions]
    classes = rng.integers(0, 3, (1, 9))
    heads = model.roi_head
    found = jax.jit(lambda heads, x, y, c: (heads.bbox_head(x), heads.mask_head(y, c)))(
        heads, *regions, classes
    )
    (logits, deltas), masks = found
    for ours, expected in zip((logits[0], deltas[0]), twin.box_head(theirs[0]), strict=True):
        assert error(ours, expected) < BOUND
    assert error(masks[0], twin.mask_head(theirs[1])[range(9), classes[0]]) < BOUND


def test_pyramid(model, images, error):
    """All levels and what the RPN makes of them, for the image alone; ours on a larger canvas."""
    canvas, alone = images
    found = jax.jit(lambda model, x, sizes: model._pyramid(x, sizes, None))(model, canvas, SIZES)
    twin = Twin(model)
    for index, image in enumerate(alone):
        for level, (x, logits, deltas) in enumerate(zip(*twin.pyramid(image), strict=True)):
            valid = np.asarray(found.valid[level][index])
            rows, columns = x.shape[2:]
            ours = np.asarray(found.maps[level][index])
            assert error(ours[:rows, :columns], x[0].permute(1, 2, 0)) < BOUND
            assert not ours[rows:].any() and not ours[:, columns:].any()
            assert error(found.outputs[level].logits[index][valid], logits) < BOUND
            assert error(found.outputs[level].deltas[index][valid], deltas) < BOUND


def test_detections(model, images):
    """Boxes within 0.01 pixels, scores and masks within 1e-4, classes and order the same."""
    canvas, alone = images
    found = jax.jit(lambda model, x, sizes: model.detect(x, sizes))(model, canvas, SIZES)
    twin = Twin(model)
    for index, image in enumerate(alone):
        boxes, scores, classes, masks = twin.detect(image, SIZES[index])
        assert len(boxes) == DETECTIONS and np.ptp(scores) > 0.05 and len(set(classes)) > 1
        assert np.asarray(found.valid[index]).all()
        np.testing.assert_array_equal(found.classes[index], classes)
        np.testing.assert_allclose(found.boxes[index], boxes, rtol=0, atol=0.01)
        np.testing.assert_allclose(found.scores[index], scores, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.masks[index], masks, rtol=0, atol=1e-4)
        assert masks.std() > 0.05, "the comparison could not fail"


def objects_of(rng, count, size):
    """Objects of 28 x 28 pixels, so that their cropped masks are exact, and their masks over the image."""
    corner = np.stack([rng.integers(0, side - 27, count) for side in size], axis=1)
    crops = (rng.random((count, 7, 7)) < 0.7).repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    whole = np.zeros((count, *(-(-size // 32) * 32)), np.uint8)
    for mask, crop, (y, x) in zip(whole, crops, corner, strict=True):
        mask[y : y + 28, x : x + 28] = crop
    return np.concatenate([corner, corner + 28], axis=1).astype(np.float32), crops, whole


def test_losses(model, images):
    """All five sums and weights of a batch; the second image has fewer objects than places."""
    canvas, alone = images
    rng = np.random.default_rng(1)
    counts = (4, 2)
    objects = [objects_of(rng, count, size) for count, size in zip(counts, SIZES, strict=True)]
    classes = [rng.integers(0, 3, count) for count in counts]
    truth = Truth(
        np.stack([np.pad(boxes, ((0, MOST - len(boxes)), (0, 0))) for boxes, _, _ in objects]),
        np.stack([np.pad(labels, (0, MOST - len(labels))) for labels in classes]).astype(np.int32),
        np.arange(MOST) < np.array(counts)[:, None],
        np.stack([np.pad(crops, ((0, MOST - len(crops)), (0, 0), (0, 0))) for _, crops, _ in objects]),
    )
    keys = jax.random.split(jax.random.key(0), 2)
    function = jax.jit(lambda model, *arguments: model.losses(*arguments))
    found = function(model, canvas, SIZES, jax.tree.map(jnp.asarray, truth), keys)

    twin, expected = Twin(model), []
    for index, image in enumerate(alone):
        draws = []
        for stride in (4, 8, 16, 32, 64):
            rows, columns, height, width = (-(-side // stride) for side in (*CANVAS, *image.shape[:2]))
            draws.append(((rows, columns, 3), (slice(height), slice(width))))
        total = sum(np.prod(shape) for shape, _ in draws)
        key = jax.random.fold_in(keys[index], ANCHOR_STREAM)
        drawn = np.asarray(jax.random.uniform(key, (total,)))
        parts = np.split(drawn, np.cumsum([np.prod(shape) for shape, _ in draws])[:-1])
        places = [x.reshape(shape)[cut].ravel() for x, (shape, cut) in zip(parts, draws, strict=True)]
        key = jax.random.fold_in(keys[index], REGION_STREAM)
        regions = np.asarray(jax.random.uniform(key, (MOST + COUNTS["train_proposals"],)))
        regions = np.concatenate([regions[: counts[index]], regions[MOST:]])
        boxes, _, whole = objects[index]
        draws = np.concatenate(places), regions
        expected.append(twin.losses(image, SIZES[index], boxes, classes[index], whole, draws))
    assert found.keys() == expected[0].keys()
    for name, (total, weight) in found.items():
        assert int(weight) == sum(losses[name][1] for losses in expected), name
        assert float(total) == pytest.approx(sum(losses[name][0] for losses in expected), rel=1e-4), name
        assert float(total) > 1, name
