"""Detections of many images on the host: pasted, joined, and written in COCO's format of results."""

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.encoded_masks import region_runs
from cnx2_jax.files import creating

THRESHOLD = 0.5  # of a pixel's probability, from which on it belongs to the object

BOX_FILE, MASK_FILE = "results_bbox.json", "results_segm.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """Detections in the order of their images, with coordinates of the original images.

    Attributes:
      image_ids: int64 [images], also of images in which nothing was detected.
      sizes: int32 [images, 2], height and width.
      counts: int64 [images], how many detections each image has.
      boxes: float32 [n, 4], y0, x0, y1, x1 in pixels.
      scores: float32 [n].
      classes: int32 [n].
      lengths: int64 [n], how many bytes of `runs` each mask has.
      runs: uint8 [bytes], the masks one after another, in COCO's compressed form.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    lengths: np.ndarray
    runs: np.ndarray

    @classmethod
    def of_image(
        cls,
        image_id: int,
        scores: Float32[np.ndarray, " most"],
        boxes: Float32[np.ndarray, "most 4"],
        classes: Int[np.ndarray, " most"],
        masks: Float32[np.ndarray, "most side side"],
        *,
        resized: Int[np.ndarray, "2"],
        original: Int[np.ndarray, "2"],
    ) -> "Detections":
        """Returns the detections of one image, in the given order.

        Args:
          image_id: its number.
          scores: 0 where there is no detection.
          boxes: in pixels of the resized image.
          classes: of each detection.
          masks: probabilities of its pixels, on a grid over its box.
          resized, original: height and width of the image, as the model saw it and as it is stored.
        """
        found = np.flatnonzero(scores > 0)
        scale = (original / resized).astype(np.float32)
        boxes = boxes[found] * np.tile(scale, 2)
        size = (int(original[0]), int(original[1]))
        pasted = [paste(masks[row], box, size) for row, box in zip(found, boxes, strict=True)]
        return cls(
            image_ids=np.array([image_id], np.int64),
            sizes=np.array([original], np.int32),
            counts=np.array([len(found)], np.int64),
            boxes=boxes,
            scores=scores[found].astype(np.float32),
            classes=classes[found].astype(np.int32),
            lengths=np.array([len(runs) for runs in pasted], np.int64),
            runs=np.frombuffer(b"".join(pasted), np.uint8),
        )

    @classmethod
    def none(cls) -> "Detections":
        """Returns the detections of no image."""
        return cls(
            image_ids=np.zeros(0, np.int64),
            sizes=np.zeros((0, 2), np.int32),
            counts=np.zeros(0, np.int64),
            boxes=np.zeros((0, 4), np.float32),
            scores=np.zeros(0, np.float32),
            classes=np.zeros(0, np.int32),
            lengths=np.zeros(0, np.int64),
            runs=np.zeros(0, np.uint8),
        )

    @classmethod
    def joined(cls, parts: Sequence["Detections"]) -> "Detections":
        """Returns the detections of several sets of images as one set."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in (cls.none(), *parts)]) for name in names}
        )

    def to_bytes(self) -> bytes:
        """Returns the detections as bytes, for another process."""
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Detections":
        """Inverse of `to_bytes`."""
        with np.load(io.BytesIO(content)) as arrays:
            return cls(**arrays)

    def masks(self) -> np.ndarray:
        """Returns the mask of each detection in COCO's compressed form: bytes, object [n]."""
        masks = np.empty(len(self.lengths), object)
        for row, end in enumerate(np.cumsum(self.lengths)):
            masks[row] = self.runs[end - self.lengths[row] : end].tobytes()
        return masks

    def results(self, annotations: Annotations, kind: str) -> Iterator[dict[str, Any]]:
        """Yields the detections as entries of COCO's results format, with the set's own category ids.

        Args:
          annotations: of the set.
          kind: "bbox" for boxes, x, y, width and height; "segm" for masks. These have no box, because
            pycocotools would take an object's size from it instead of from the mask.
        """
        images = np.repeat(np.arange(len(self.counts)), self.counts)
        for row, (image, mask) in enumerate(zip(images, self.masks(), strict=True)):
            entry = {
                "image_id": int(self.image_ids[image]),
                "category_id": int(annotations.category_ids[self.classes[row]]),
                "score": float(self.scores[row]),
            }
            if kind == "bbox":
                y0, x0, y1, x1 = self.boxes[row].astype(np.float64).tolist()
                yield {**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            else:
                yield {**entry, "segmentation": {"size": self.sizes[image].tolist(), "counts": mask}}


def paste(
    mask: Float32[np.ndarray, "side side"], box: Float32[np.ndarray, "4"], size: tuple[int, int]
) -> bytes:
    """Returns the pixels of an object in its image, as COCO's compressed run lengths.

    Interpolates between the centres of the mask's cells and, as Detectron2 and mmdetection do, towards 0
    beyond the outermost; a pixel belongs to the object from THRESHOLD on.

    Args:
      mask: probabilities on a grid over the box.
      box: y0, x0, y1, x1 in pixels; may reach out of the image.
      size: height and width of the image.
    """
    first = np.clip(np.floor(box[:2]), 0, size).astype(int)
    last = np.maximum(np.clip(np.ceil(box[2:]), 0, size).astype(int), first)
    rows, columns = (
        _weights(first[axis], last[axis], float(box[axis]), float(box[axis + 2]), mask.shape[axis])
        for axis in (0, 1)
    )
    inside = rows @ mask @ columns.T >= THRESHOLD
    return region_runs(inside, int(first[0]), int(first[1]), size)


def _weights(first: int, last: int, begin: float, end: float, cells: int) -> Float32[np.ndarray, "n cells"]:
    """Returns the weights of cells, which divide [begin, end) evenly, at the centres of pixels."""
    places = (np.arange(first, last) + 0.5 - begin) / max(end - begin, 1e-6) * cells - 0.5
    return np.maximum(1 - np.abs(places[:, None] - np.arange(cells)), 0).astype(np.float32)


def write_results(folder: Path, detections: Detections, annotations: Annotations) -> None:
    """Writes `results_bbox.json` and `results_segm.json`, as COCO's tools and its server read them.

    Args:
      folder: a path that does not exist.
      detections: of the set.
      annotations: of the set.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    with creating(folder) as partial:
        partial.mkdir()
        for name, kind in ((BOX_FILE, "bbox"), (MASK_FILE, "segm")):
            entries = [_as_text(entry) for entry in detections.results(annotations, kind)]
            (partial / name).write_text(json.dumps(entries), encoding="utf-8")


def _as_text(entry: Mapping[str, Any]) -> dict[str, Any]:
    if "segmentation" not in entry:
        return dict(entry)
    segmentation = entry["segmentation"]
    return {**entry, "segmentation": {**segmentation, "counts": segmentation["counts"].decode("ascii")}}
