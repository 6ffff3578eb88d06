"""Mask R-CNN in PyTorch, for one image at a time; importing this skips a test without PyTorch or ONNX.

The backbone is from transformers, RoIAlign from onnxruntime, and all that concerns boxes from
detection_loops.py. An image is padded to multiples of 32 alone, as in mmdetection's test.
"""

import functools

import detection_loops as loops
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.interop.names import to_torch
from cnx2_jax.models import MaskRCNN
from cnx2_jax.models.mask_rcnn.anchors import grid_anchors
from cnx2_jax.models.mask_rcnn.boxes import HEAD_STDS, RPN_STDS
from cnx2_jax.models.mask_rcnn.roi_align import levels_of
from cnx2_jax.models.state import split

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
functional = torch.nn.functional

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
        self.weights = {name: torch.tensor(x) for name, x in to_torch(arrays, "mmdetection").items()}

    def layer(self, name, x, function, **options):
        return function(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def conv(self, name, x, padding=0):
        return self.layer(name, x, functional.conv2d, padding=padding)

    def linear(self, name, x):
        return self.layer(name, x, functional.linear)

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
            exists = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            found += [(scores[order[i]], boxes[i]) for i in loops.nms(boxes, scores[order], exists, 0.7)]
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
        x = self.layer("roi_head.mask_head.upsample", x, functional.conv_transpose2d, stride=2).relu()
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
        present = np.ones(len(objects), bool)

        matched = loops.match(anchors, np.ones(len(anchors), bool), objects, present, 0.7, 0.3, 0.3)
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
        matched = loops.match(proposals, np.ones(len(proposals), bool), objects, present, 0.5, 0.5, None)
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
