"""Object detection and instance segmentation: Mask R-CNN on images with boxes and masks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.detection_keys import RANGES, add_detection_keys
from cnx2_jax.data.encoded_masks import decode_mask, encode_runs
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.coco import AveragePrecision
from cnx2_jax.evaluation.detections import Detections, write_results
from cnx2_jax.evaluation.metrics import Collected, Metric
from cnx2_jax.evaluation.report import Report, class_report
from cnx2_jax.files import to_path
from cnx2_jax.models import MaskRCNN
from cnx2_jax.models.mask_rcnn import Truth
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.observe.objects import Objects, draw_detections, draw_objects, unfolded
from cnx2_jax.observe.progress import watched
from cnx2_jax.tasks import models, weights
from cnx2_jax.tasks.base import Task
from cnx2_jax.train.terms import Term, Terms
from cnx2_jax.types import HOST, Batch, HostBatch

HEADS = ("roi_head.bbox_head.fc_cls.", "roi_head.bbox_head.fc_reg.", "roi_head.mask_head.conv_logits.")
WIDTHS = ("channels", "fc_channels")
COUNTS = (
    *("train_candidates", "train_proposals", "candidates", "proposals"),
    *("rpn_samples", "roi_samples", "detections"),
)
PICTURES = 6  # rows of the grid that an evaluation writes
SHOWN_SCORE = 0.3  # from which on people see a detection


class Detect(Task, name="detect"):
    """Mask R-CNN on the images and objects of a config, from scratch or from `config.init_from`.

    Evaluation resizes whole images and compares with the annotations in their original pixels: COCO's twelve
    numbers of boxes and of masks, from `box_ap` to `mask_ar_large` (see AveragePrecision).

    Raises:
      UserError: see `Task`, `DetectionData` and `weights.starting_params`; or a key is out of range.
    """

    best = ("box_ap", "max")
    gives_report = True
    writes_results = True
    gives_features = False
    gives_pictures = True
    ranges: ClassVar = {
        "model.channels": (1, float("inf")),
        "model.fc_channels": (1, float("inf")),
        "model.train_candidates": (1, float("inf")),
        "model.train_proposals": (1, float("inf")),
        "model.candidates": (1, float("inf")),
        "model.proposals": (1, float("inf")),
        "model.rpn_samples": (2, float("inf")),
        "model.roi_samples": (4, float("inf")),
        "model.detections": (1, float("inf")),
        **RANGES,
    }

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.init_from = ""  # a checkpoint of any task to start from; empty: from scratch
        config.init_bands = ""  # how its stem fits images of other bands: mean, tile, map:R,G,B or fresh
        config.model.channels = 256  # of the feature pyramid, the region proposals and the mask head
        config.model.fc_channels = 1024  # of the box head
        config.model.train_candidates = 2000  # boxes of a level before suppression, in training
        config.model.train_proposals = 1000  # boxes of an image after suppression, in training
        config.model.candidates = 1000  # boxes of a level before suppression, in evaluation
        config.model.proposals = 1000  # boxes of an image after suppression, in evaluation
        config.model.rpn_samples = 256  # anchors of an image in the loss
        config.model.roi_samples = 512  # regions of an image in the loss
        config.model.detections = 100  # most objects that are found in an image
        add_detection_keys(config.data)

    def open_data(self) -> Any:
        from cnx2_jax.data.detection import DetectionData  # TensorFlow is needed for images alone

        data = DetectionData(self.config)
        if data.annotations.crowds.all():
            raise UserError(
                f"none of the {data.num_val} validation images has an object, so there is nothing to "
                "evaluate; check data.val_annotations"
            )
        return data

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        config = self.config
        count, most, side = config.batch_size, config.data.max_instances, config.data.mask_side
        image = (count, *image_hw(config), config.model.in_chans)
        return {
            "image": jax.ShapeDtypeStruct(image, jnp.uint8),
            "image_size": jax.ShapeDtypeStruct((count, 2), jnp.int32),
            "boxes": jax.ShapeDtypeStruct((count, most, 4), jnp.float32),
            "classes": jax.ShapeDtypeStruct((count, most), jnp.int32),
            "masks": jax.ShapeDtypeStruct((count, most, side, side), jnp.uint8),
            "instances_valid": jax.ShapeDtypeStruct((count, most), jnp.bool_),
        }

    def init(self, rngs: nnx.Rngs) -> MaskRCNN:
        options = {name: self.config.model[name] for name in (*WIDTHS, *COUNTS)}
        encoder = models.encoder_config(self.config, self.platform)
        return MaskRCNN(encoder, num_classes=len(self.class_names), rngs=rngs, **options)

    def start(self, arrays: Params) -> Params:
        if not self.config.init_from:
            return arrays
        return weights.starting_params(
            to_path(self.config.init_from),
            self.config,
            arrays,
            self.class_names,
            encoder_prefix=MaskRCNN.encoder_prefix,
            heads=HEADS,
        )

    def loss(self, model: MaskRCNN, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        """Returns the five losses of Mask R-CNN; see `models.mask_rcnn.losses`."""
        images = self.normalised(batch["image"], batch["image_size"])
        truth = Truth(batch["boxes"], batch["classes"], batch["instances_valid"], batch["masks"])
        found = model.losses(images, batch["image_size"], truth, keys)
        return {name: Term(*parts) for name, parts in found.items()}, {}

    def score(self, model: MaskRCNN, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        images, sizes = batch["image"], batch["image_size"]
        found = model.detect(self.normalised(images, sizes), sizes)
        return {name: getattr(found, name) for name in AveragePrecision.names}

    def metrics(self) -> Sequence[Metric]:
        return (AveragePrecision(self.data.annotations),)

    def report(self, collected: Collected) -> Report:
        columns = AveragePrecision(self.data.annotations).per_class(_detections(collected))
        return class_report(self.class_names, columns)

    def write_results(self, collected: Collected, folder: Path) -> None:
        """Writes `results_bbox.json` and `results_segm.json` in COCO's format; see the base class."""
        write_results(folder, _detections(collected), self.data.annotations)

    def predict(self, model: MaskRCNN, source: Any, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields each image at its own size, and the objects in it, by falling score.

        Images are taken one at a time, on canvases of few sizes, so that few programs are compiled.

        Yields:
          `image` uint8 `[H, W, C]`; `boxes` float32 `[n, 4]`, y0, x0, y1, x1 in its pixels; `scores` float32
          `[n]`; `classes` int32 `[n]`; and `masks`, object `[n]`: COCO's compressed run lengths, as bytes.
        """
        # These load TensorFlow.
        from cnx2_jax.data.detection import prediction_images
        from cnx2_jax.data.prepared import CANVAS_STEP, on_canvas

        graph, arrays = split(model)
        multiple = math.lcm(CANVAS_STEP, model.stride)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for prepared in prediction_images(source, self.config):
                (resized,) = prepared.scaled
                yield {
                    "original": prepared.original,
                    "image": on_canvas(resized, multiple),
                    "image_size": np.array([resized.shape[:2]], np.int32),
                    "mask": np.ones(1, bool),
                }

        for batch in watched(batches(), source.num_records):
            image = batch.pop("original")
            found = _scored(self, graph, arrays, batch)
            yield {"image": image, **_of_row(found, 0, batch["image_size"][0], np.array(image.shape[:2]))}

    def prediction(self, outputs: Mapping[str, np.ndarray], top: int) -> dict:
        """Returns `objects`, by falling score: `class`, `name`, `score`, `bbox` and `segmentation` of each.

        These two are as in COCO's files: x, y, width and height in pixels of the image, and run lengths.
        """
        size = list(outputs["image"].shape[:2])
        rows = (outputs[name] for name in ("boxes", "scores", "classes", "masks"))
        objects = []
        for box, score, number, mask in zip(*rows, strict=True):
            y0, x0, y1, x1 = box.astype(np.float64).tolist()
            objects.append(
                {
                    "class": int(number),
                    "name": self.class_names[number],
                    "score": float(score),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": size, "counts": mask.decode("ascii")},
                }
            )
        return {"objects": objects}

    def prediction_lines(self, prediction: dict) -> list[str]:
        """Returns a line for each object whose score is at least SHOWN_SCORE."""
        width, lines = max(map(len, self.class_names)), []
        for found in prediction["objects"]:
            if found["score"] >= SHOWN_SCORE:
                x, y, across, down = map(round, found["bbox"])
                place = f"x {x}, y {y}, {across} x {down} pixels"
                lines.append(f"  {found['name']:<{width}}  {found['score']:6.2%}  {place}")
        return lines or [f"  nothing with a score of {SHOWN_SCORE} or more"]

    def prediction_pictures(self, outputs: Mapping[str, np.ndarray]) -> dict[str, Image.Image]:
        """Returns `objects`: the image with the objects whose score is at least SHOWN_SCORE."""
        image = outputs["image"]
        objects = _shown(outputs, (image.shape[0], image.shape[1]))
        return {"objects": Image.fromarray(draw_objects(image, objects, self.class_names))}

    def sheet(self, batch: HostBatch, prepared: Batch) -> tuple[np.ndarray, list[str]]:
        """Draws the objects over the images and names them."""
        drawn, captions = [], []
        names = ("image", "boxes", "classes", "masks", "instances_valid")
        for image, boxes, classes, masks, valid in zip(*(batch[name] for name in names), strict=True):
            boxes, classes = boxes[valid], classes[valid]
            size = image.shape[0], image.shape[1]
            objects = Objects(boxes, classes, unfolded(masks[valid], boxes, size))
            drawn.append(draw_objects(image, objects, self.class_names))
            captions.append(", ".join(self.class_names[number] for number in classes))
        return np.stack(drawn), captions

    def pictures(self, model: MaskRCNN) -> dict[str, np.ndarray]:
        """Returns `detections`: a few validation images with their true and their detected objects."""
        batch = next(iter(self.data.eval_batches()))
        rows = np.flatnonzero(batch["mask"])[:PICTURES]
        images, sizes, ids = (x[rows] for x in (batch["image"], batch["image_size"], batch[HOST]["id"]))
        graph, arrays = split(model)
        # One device is enough for a few images, and it spares dividing them over a mesh.
        found = _scored(self, graph, jax.device_get(arrays), {"image": images, "image_size": sizes})
        shown = []
        for row, (image, size, number) in enumerate(zip(images, sizes, ids, strict=True)):
            height, width = size.tolist()
            truth = _truth(self.data.annotations, int(number), (height, width))
            detected = _shown(_of_row(found, row, size, size), (height, width))
            shown.append((image[:height, :width], truth, detected))
        return {"detections": draw_detections(shown, self.class_names)}


def _detections(collected: Collected) -> Detections:
    """Returns the detections of a pass; they are the total of the only metric."""
    ((_, total),) = collected.totals
    return total


def _of_row(
    found: Mapping[str, Array], row: int, resized: Int[np.ndarray, "2"], original: Int[np.ndarray, "2"]
) -> dict[str, np.ndarray]:
    """Returns the objects in one image of a batch, as `predict` yields them; see `Detections.of_image`."""
    rows: dict[str, Any] = {name: np.asarray(array)[row] for name, array in found.items()}
    objects = Detections.of_image(0, **rows, resized=resized, original=original)
    return {
        "boxes": objects.boxes,
        "scores": objects.scores,
        "classes": objects.classes,
        "masks": objects.masks(),
    }


def _shown(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Objects:
    """Returns the objects that people see, with the pixels of their masks."""
    rows = np.flatnonzero(outputs["scores"] >= SHOWN_SCORE)
    masks = [decode_mask(encode_runs(outputs["masks"][row], size), size) > 0 for row in rows]
    return Objects(
        outputs["boxes"][rows],
        outputs["classes"][rows],
        np.array(masks, bool).reshape(-1, *size),
        outputs["scores"][rows],
    )


def _truth(annotations: Annotations, image_id: int, size: tuple[int, int]) -> Objects:
    """Returns the annotated objects of an image, in pixels of the image resized to this height and width."""
    of_image = annotations.only(np.flatnonzero(annotations.image_ids == image_id))
    height, width = of_image.sizes[0].tolist()
    x, y, across, down = of_image.boxes.T
    scale = np.tile(np.array(size) / (height, width), 2)
    masks = [
        Image.fromarray(decode_mask(mask, (height, width))).resize(size[::-1], Image.Resampling.NEAREST)
        for mask in of_image.masks
    ]
    return Objects(
        np.stack([y, x, y + down, x + across], axis=1) * scale,
        of_image.classes,
        np.array([np.asarray(mask) for mask in masks], bool).reshape(-1, *size),
    )


@partial(jax.jit, static_argnames=("task", "graph"))
def _scored(task: Detect, graph: nnx.GraphDef, arrays: Params, batch: Batch) -> dict[str, Array]:
    """Returns what `score` returns; images of one canvas share a program."""
    return task.score(merge(graph, arrays), batch, jnp.arange(len(batch["image"])))
