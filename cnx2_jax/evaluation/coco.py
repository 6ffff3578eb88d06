"""COCO's average precision of boxes and masks, over all images of a set."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cnx2_jax.cluster.agree import gathered_bytes
from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.encoded_masks import to_rle
from cnx2_jax.evaluation.detections import Detections
from cnx2_jax.evaluation.metrics import Scores, local_rows
from cnx2_jax.types import Metrics

KINDS = {"box": "bbox", "mask": "segm"}  # by the first part of a metric's name
# In the order of pycocotools's `stats`.
_NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


class AveragePrecision:
    """COCO's twelve numbers of boxes and of masks, by pycocotools: box_ap, box_ap50 ... mask_ar_large.

    Images without any detection count, as do detections in images without objects. Numbers of what does not
    occur in the set, such as small objects, are left out.

    Scores, for a fixed number of detections per image: `boxes` float32 `[B, n, 4]`, y0, x0, y1, x1 in pixels
    of the resized image; `scores` float32 `[B, n]`, 0 where there is none; `classes` `[B, n]`; `masks`
    float32 `[B, n, m, m]`, probabilities on a grid over the box. On the host: `id`, `image_size`,
    `original_size`, as from `DetectionData`.

    Args:
      annotations: of the validation set.
    """

    names = ("boxes", "scores", "classes", "masks")

    def __init__(self, annotations: Annotations):
        self.annotations = annotations

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AveragePrecision) and other.annotations is self.annotations

    def __hash__(self) -> int:
        return hash((AveragePrecision, id(self.annotations)))

    def empty(self) -> list[Detections]:
        return []

    def update(self, scores: Scores, valid: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        return {name: scores[name] for name in self.names}, valid

    def add(self, total, contribution, host: Mapping[str, np.ndarray]) -> list[Detections]:
        """Turns this process's masks into run lengths, which are a hundredth of their size."""
        scores, valid = contribution
        rows = {name: local_rows(score) for name, score in scores.items()}
        return [
            *total,
            *(
                Detections.of_image(
                    int(host["id"][row]),
                    **{name: array[row] for name, array in rows.items()},
                    resized=host["image_size"][row],
                    original=host["original_size"][row],
                )
                for row in np.flatnonzero(local_rows(valid))
            ),
        ]

    def merge(self, total: list[Detections]) -> Detections:
        """Returns the detections of all processes, those of each image once."""
        parts = gathered_bytes(Detections.joined(total).to_bytes())
        return Detections.joined([Detections.from_bytes(part) for part in parts])

    def result(self, total: Detections) -> Metrics:
        """Returns the numbers by name, shares of 1."""
        results: Metrics = {}
        for name, kind in KINDS.items():
            numbers = zip(_NUMBERS, evaluated(self.annotations, total, kind).stats.tolist(), strict=True)
            results |= {f"{name}_{of}": number for of, number in numbers if number >= 0}
        return results

    def per_class(self, total: Detections) -> dict[str, np.ndarray]:
        """Returns `box_ap` and `mask_ap` of every class, `[classes]` each; NaN where it has no objects."""
        return {
            f"{name}_ap": _ap_of_classes(evaluated(self.annotations, total, kind))
            for name, kind in KINDS.items()
        }


def evaluated(annotations: Annotations, detections: Detections, kind: str) -> COCOeval:
    """Returns pycocotools's evaluation of the images of `detections`, summarized.

    Args:
      annotations: of the set.
      detections: of its images, or of some of them; only these count.
      kind: "bbox" or "segm".
    """
    places = {number: place for place, number in enumerate(annotations.image_ids.tolist())}
    chosen = np.array([places[number] for number in detections.image_ids.tolist()], np.int64)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = _truth(annotations.only(chosen), kind)
        found = _loaded(truth, list(detections.results(annotations, kind)))
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _truth(annotations: Annotations, kind: str) -> COCO:
    images = np.repeat(np.arange(len(annotations.image_ids)), annotations.counts)
    entries = []
    for row, image in enumerate(images.tolist()):
        entry = {
            "id": row + 1,  # pycocotools takes the id 0 for "no match"
            "image_id": int(annotations.image_ids[image]),
            "category_id": int(annotations.category_ids[annotations.classes[row]]),
            "bbox": annotations.boxes[row].tolist(),
            "area": float(annotations.areas[row]),
            "iscrowd": int(annotations.crowds[row]),
        }
        if kind == "segm":
            height, width = annotations.sizes[image].tolist()
            entry["segmentation"] = to_rle(annotations.masks[row], (height, width))
        entries.append(entry)
    return _indexed(
        {
            "images": [
                {"id": number, "height": height, "width": width}
                for number, (height, width) in zip(
                    annotations.image_ids.tolist(), annotations.sizes.tolist(), strict=True
                )
            ],
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(
                    annotations.category_ids.tolist(), annotations.class_names, strict=True
                )
            ],
            "annotations": entries,
        }
    )


def _loaded(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    if results:
        return truth.loadRes(results)
    return _indexed({**truth.dataset, "annotations": []})  # `loadRes` fails on none


def _indexed(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _ap_of_classes(evaluation: COCOeval) -> np.ndarray:
    # [IoU thresholds, recalls, classes, sizes of objects, detections per image]: all sizes, 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    counted = precision > -1  # no recall is defined for a class without objects
    with np.errstate(invalid="ignore"):
        return np.where(counted, precision, 0).sum(axis=(0, 1)) / counted.sum(axis=(0, 1))
