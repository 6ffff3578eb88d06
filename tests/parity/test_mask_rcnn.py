"""Mask R-CNN against PyTorch: the same weights, image by image without padding, and plain loops over boxes.

The twin takes its backbone from transformers, its RoIAlign from onnxruntime, and all that concerns boxes
from tests/detection_loops.py. It sees each image padded to multiples of 32 alone, as mmdetection's test does,
while ours sees both on one larger canvas.
"""

import functools

import detection_loops as loops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.interop.names import to_torch
from cnx2_jax.models import EncoderConfig, MaskRCNN
from cnx2_jax.models.mask_rcnn import Truth, paste_masks
from cnx2_jax.models.mask_rcnn.anchors import grid_anchors
from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS, RPN_STDS
from cnx2_jax.models.mask_rcnn.model import ANCHOR_STREAM, REGION_STREAM
from cnx2_jax.models.mask_rcnn.nms import nms
from cnx2_jax.models.mask_rcnn.roi_align import levels_of, roi_align
from cnx2_jax.models.state import split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
functional = torch.nn.functional

pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.slow]

SIZES = np.array([[90, 120], [50, 100]], np.int32)
CANVAS = (96, 128)
COUNTS = {"train_candidates": 30, "train_proposals": 40, "candidates": 25, "proposals": 20}
OPTIONS = {"num_classes": 3, "channels": 16, "fc_channels": 24, "rpn_samples": 32, "roi_samples": 24}
DETECTIONS = 12


@functools.cache
def operator(kind: str, inputs: str, output: str, **attributes):
    """Returns a function that runs one operator of ONNX; `inputs` and `output` are types, such as "fi"."""
    types = {"f": onnx.TensorProto.FLOAT, "i": onnx.TensorProto.INT64}
    names = [f"x{index}" for index in range(len(inputs))]
    node = onnx.helper.make_node(kind, names, ["y"], **attributes)
    values = [
        onnx.helper.make_tensor_value_info(n, types[t], None) for n, t in zip(names, inputs, strict=True)
    ]
    result = onnx.helper.make_tensor_value_info("y", types[output], None)
    graph = onnx.helper.make_graph([node], "graph", values, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def theirs_aligned(x, boxes, stride, bins):
    """Returns regions `[R, C, bins, bins]` of a map `[1, C, h, w]`, by onnxruntime."""
    options = {"output_height": bins, "output_width": bins, "sampling_ratio": 0, "spatial_scale": 1 / stride}
    run = operator("RoiAlign", "ffi", "f", coordinate_transformation_mode="half_pixel", **options)
    return run(x, np.ascontiguousarray(boxes[:, [1, 0, 3, 2]]), np.zeros(len(boxes), np.int64))


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

    In float32 both have an error of 2e-6 of what float64 gives, from rounding the samples' positions.
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
        with jax.enable_x64(True):
            exact = align([x.astype(np.float64)], np.float64(boxes)[None], size)[0]
        assert error(expected, exact) < 4e-6 and error(found, exact) < 4e-6


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


class Twin:
    """The network in PyTorch, for one image at a time."""

    def __init__(self, model: MaskRCNN):
        arrays = {name: np.asarray(value) for name, value in split(model)[1].items()}
        backbone = {name: value for name, value in arrays.items() if name.startswith("backbone.")}
        config = transformers.ConvNextV2Config(
            depths=list(model.config.depths),
            hidden_sizes=list(model.config.dims),
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        self.backbone = transformers.ConvNextV2Backbone(config).eval()
        tensors = to_torch(backbone, "huggingface")
        self.backbone.load_state_dict(
            {name.removeprefix("backbone."): torch.tensor(value) for name, value in tensors.items()}
        )
        others = {name: value for name, value in arrays.items() if name not in backbone}
        self.weights = {name: torch.tensor(value) for name, value in to_torch(others, "official").items()}

    def layer(self, name, x, function, **options):
        return function(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def conv(self, name, x, padding=0):
        return self.layer(name, x, functional.conv2d, padding=padding)

    def linear(self, name, x):
        weight = self.weights[f"{name}.weight"].flatten(1)  # of a whole region: [out, C, 7, 7]
        return functional.linear(x, weight, self.weights[f"{name}.bias"])

    def pyramid(self, image):
        """Returns the levels `[1, C, h, w]`, and per level logits `[n]` and deltas `[n, 4]`."""
        maps = self.backbone(torch.tensor(image.transpose(2, 0, 1)[None])).feature_maps
        levels = [self.conv(f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
        for i in (2, 1, 0):
            levels[i] = levels[i] + functional.interpolate(levels[i + 1], scale_factor=2, mode="nearest")
        levels = [self.conv(f"neck.fpn_convs.{i}.conv", x, 1) for i, x in enumerate(levels)]
        levels.append(functional.max_pool2d(levels[-1], 1, stride=2))
        logits, deltas = [], []
        for level in levels:
            x = self.conv("rpn_head.rpn_conv", level, 1).relu()
            logits.append(self.conv("rpn_head.rpn_cls", x).permute(0, 2, 3, 1).flatten().numpy())
            deltas.append(self.conv("rpn_head.rpn_reg", x).permute(0, 2, 3, 1).reshape(-1, 4).numpy())
        return levels, logits, deltas

    @staticmethod
    def anchors(levels):
        """Returns the anchors of each level; tests/models compares them with mmdetection's."""
        return [
            np.asarray(grid_anchors((x.shape[2], x.shape[3]), stride))
            for x, stride in zip(levels, (4, 8, 16, 32, 64), strict=True)
        ]

    def proposals(self, levels, logits, deltas, size, before, after):
        """Returns boxes by falling score."""
        found = []
        for around, scores, moves in zip(self.anchors(levels), logits, deltas, strict=True):
            order = np.argsort(-scores, kind="stable")[:before]
            boxes = np.float32([loops.decode(around[i], moves[i], RPN_STDS, size) for i in order])
            there = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            found += [(scores[order[i]], boxes[i]) for i in loops.nms(boxes, scores[order], there, 0.7)]
        found.sort(key=lambda pair: -pair[0])
        return np.stack([box for _, box in found[:after]])

    @staticmethod
    def regions(levels, boxes, bins):
        """Returns the regions of boxes, each from its own level: `[R, C, bins, bins]`."""
        chosen = np.asarray(levels_of(jnp.asarray(boxes), 4, 4))
        cut = [theirs_aligned(x.numpy(), boxes, 4 * 2**i, bins) for i, x in enumerate(levels[:-1])]
        return torch.tensor(np.stack([cut[level][row] for row, level in enumerate(chosen)]))

    def box_head(self, regions):
        x = self.linear("roi_head.bbox_head.shared_fcs.0", regions.flatten(1)).relu()
        x = self.linear("roi_head.bbox_head.shared_fcs.1", x).relu()
        names = "roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"
        logits, deltas = (self.linear(name, x) for name in names)
        return logits, deltas.reshape(len(x), -1, 4).numpy()

    def mask_head(self, regions):
        """Returns the logits of all classes, `[R, classes, 28, 28]`."""
        x = regions
        for i in range(4):
            x = self.conv(f"roi_head.mask_head.convs.{i}.conv", x, 1).relu()
        name = "roi_head.mask_head.upsample"
        kernel = self.weights[f"{name}.weight"].transpose(0, 1)  # PyTorch has [in, out, rows, columns] here
        x = functional.conv_transpose2d(x, kernel, self.weights[f"{name}.bias"], stride=2).relu()
        return self.conv("roi_head.mask_head.conv_logits", x)

    def detect(self, image, size):
        """Returns boxes, scores, classes and masks."""
        levels, logits, deltas = self.pyramid(image)
        proposals = self.proposals(levels, logits, deltas, size, COUNTS["candidates"], COUNTS["proposals"])
        logits, deltas = self.box_head(self.regions(levels, proposals, 7))
        scores = logits.softmax(dim=1)[:, :-1].numpy().T
        boxes = np.float32(
            [
                [
                    loops.decode(box, move[c], HEAD_STDS, size)
                    for box, move in zip(proposals, deltas, strict=True)
                ]
                for c in range(len(scores))
            ]
        )
        taken = loops.soft_nms(boxes, np.where(scores > 0.05, scores, 0), DETECTIONS, 0.5, 0.001)
        boxes = np.stack([boxes[c, i] for c, i, _ in taken])
        masks = self.mask_head(self.regions(levels, boxes, 14)).sigmoid()
        classes = [c for c, _, _ in taken]
        return boxes, [s for _, _, s in taken], classes, masks[range(len(taken)), classes].numpy()

    def losses(self, image, size, objects, classes, masks, draws):
        """Returns sums and weights by name; `draws` are the random numbers of anchors and of regions."""
        levels, logits, deltas = self.pyramid(image)
        before, after = COUNTS["train_candidates"], COUNTS["train_proposals"]
        proposals = self.proposals(levels, logits, deltas, size, before, after)
        anchors, logits, deltas = (np.concatenate(x) for x in (self.anchors(levels), logits, deltas))
        there = np.ones(len(objects), bool)

        matched = loops.match(anchors, np.ones(len(anchors), bool), objects, there, 0.7, 0.3, 0.3)
        positive, negative = loops.sample(
            draws[0], matched, OPTIONS["rpn_samples"], OPTIONS["rpn_samples"] // 2
        )
        found = {"rpn_class_loss": 0.0, "rpn_box_loss": 0.0}
        for i in positive:
            found["rpn_class_loss"] += np.log1p(np.exp(-logits[i]))
            target = loops.encode(anchors[i], objects[matched[i]], RPN_STDS)
            found["rpn_box_loss"] += np.abs(deltas[i] - target).sum()
        found["rpn_class_loss"] += sum(np.log1p(np.exp(logits[i])) for i in negative)
        weights = {name: len(positive) + len(negative) for name in found}

        count = OPTIONS["roi_samples"]
        matched = loops.match(proposals, np.ones(len(proposals), bool), objects, there, 0.5, 0.5, None)
        matched = [*range(len(objects)), *matched]
        boxes = np.concatenate([objects, proposals])
        positive, negative = loops.sample(draws[1], matched, count, count // 4)
        chosen = [*positive, *negative]
        logits, deltas = self.box_head(self.regions(levels, boxes[chosen], 7))
        labels = [classes[matched[i]] for i in positive] + [OPTIONS["num_classes"]] * len(negative)
        found["class_loss"] = float(functional.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
        found["box_loss"] = 0.0
        for row, i in enumerate(positive):
            target = loops.encode(np.float64(boxes[i]), objects[matched[i]], HEAD_STDS)
            found["box_loss"] += np.abs(deltas[row, labels[row]] - target).sum()
        weights |= {"class_loss": len(chosen), "box_loss": len(chosen)}

        logits = self.mask_head(self.regions(levels, boxes[positive], 14))
        targets = torch.tensor(np.stack([loops.mask_target(masks[matched[i]], boxes[i]) for i in positive]))
        logits = logits[range(len(positive)), labels[: len(positive)]].double()
        loss = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        found["mask_loss"], weights["mask_loss"] = float(loss), targets.numel()
        return {name: (found[name], weights[name]) for name in found}


SMALL = EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32))
MOST = 4  # places for objects


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
