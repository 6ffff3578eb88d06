"""Reads files of annotations in COCO's format, and refuses those that break its rules."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cnx2_jax.data.annotations import Annotations
from cnx2_jax.data.encoded_masks import encode_polygons, encode_runs
from cnx2_jax.errors import UserError

_PARTS = ("images", "annotations", "categories")


class CocoFile(NamedTuple):
    """What a file holds.

    Attributes:
      path: of the file.
      names: the path of each image in the folder of images.
      annotations: of the images, in the same order: that of the file.
    """

    path: str
    names: list[str]
    annotations: Annotations


def read_coco_file(path: str, key: str) -> CocoFile:
    """Reads a file of annotations.

    Categories become classes 0, 1, 2 ... in the order of their ids, which may have gaps. Boxes stay as they
    are, because results are compared with them; how many reach out of their images is printed once.

    Args:
      path: of the file.
      key: the config key that gave it, for messages.

    Raises:
      UserError: the file is not as described, or has an annotation of an unknown image or category, a polygon
        or run lengths that are malformed or do not fit their image, an id twice, or no annotation at all.
    """
    parts = _parsed(path, key)
    image_of = _numbered(parts["images"], "image", path)
    category_of = _numbered(parts["categories"], "category", path)
    sizes, names = _images(parts["images"], path)
    if not parts["annotations"]:
        raise UserError(f"{key} '{path}' has no annotations; give the file of a set with objects")
    _numbered(parts["annotations"], "annotation", path)
    category_ids = np.sort(np.fromiter(category_of, np.int64))
    class_names = tuple(str(parts["categories"][category_of[number]].get("name")) for number in category_ids)
    if len(set(class_names)) < len(class_names):
        name = next(name for name in class_names if class_names.count(name) > 1)
        raise UserError(f"'{path}' has two categories with the name '{name}'; rename one")
    class_of = {number: place for place, number in enumerate(category_ids.tolist())}

    count = len(parts["annotations"])
    images, classes = np.empty(count, np.int64), np.empty(count, np.int32)
    boxes, areas = np.empty((count, 4)), np.empty(count)
    crowds, masks = np.empty(count, bool), np.empty(count, object)
    for row, entry in enumerate(parts["annotations"]):
        for name, known, kind in (("image_id", image_of, "image"), ("category_id", class_of, "category")):
            if not isinstance(entry.get(name), int) or entry[name] not in known:
                raise _refused(entry, f"is of {kind} {entry.get(name)}, which the file does not list", path)
        images[row], classes[row] = image_of[entry["image_id"]], class_of[entry["category_id"]]
        boxes[row], areas[row] = _box(entry, path)
        crowds[row] = bool(entry.get("iscrowd", 0))
        try:
            masks[row] = _mask(entry.get("segmentation"), sizes[images[row]])
        except ValueError as error:
            raise _refused(entry, str(error), path) from None
    _warn_of_boxes_outside(boxes, sizes[images], path)
    order = np.argsort(images, kind="stable")
    annotations = Annotations(
        image_ids=np.fromiter(image_of, np.int64),
        sizes=sizes,
        starts=np.searchsorted(images[order], np.arange(len(sizes) + 1)),
        boxes=boxes[order],
        areas=areas[order],
        classes=classes[order],
        crowds=crowds[order],
        masks=masks[order],
        class_names=class_names,
        category_ids=category_ids,
    )
    return CocoFile(path, names, annotations)


def _parsed(path: str, key: str) -> dict[str, list[dict]]:
    if not os.path.isfile(path):
        raise UserError(f"{key} '{path}' is not a file; check data.root and {key}")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=_with_encoded_polygons)
    except OSError as error:
        raise UserError(f"cannot read {key} '{path}': {error.strerror}; check the path") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{key} '{path}' is not JSON: {error}; it may be truncated") from error
    for part in _PARTS:
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{key} '{path}' has no list '{part}'; give a file in COCO's format")
    return content


def _with_encoded_polygons(entry: dict) -> dict:
    """Encodes polygons as soon as they are parsed: as Python's numbers, all of COCO's take gigabytes."""
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        try:
            entry["segmentation"] = encode_polygons(polygons)
        except ValueError as error:
            entry["segmentation"] = error  # raised where the annotation can be named
    return entry


def _mask(segmentation: Any, size: np.ndarray) -> bytes:
    if isinstance(segmentation, bytes):
        return segmentation
    if isinstance(segmentation, ValueError):
        raise segmentation
    if not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
        raise ValueError("has no segmentation: a list of polygons, or run lengths with counts and size")
    height, width = size.tolist()
    if segmentation["size"] != [height, width]:
        raise ValueError(f"has run lengths for {segmentation['size']}, but its image is {[height, width]}")
    return encode_runs(segmentation["counts"], (height, width))


def _numbered(entries: Sequence[Mapping], kind: str, path: str) -> dict[int, int]:
    """Returns the place of each entry by its id."""
    places: dict[int, int] = {}
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if not isinstance(number, int) or not -(2**63) <= number < 2**63:
            raise UserError(f"{kind} number {place} of '{path}' has the id {number!r}; ids are whole numbers")
        if number in places:
            raise UserError(f"'{path}' has two of kind {kind} with the id {number}; ids must differ")
        places[number] = place
    return places


def _images(entries: Iterable[Mapping], path: str) -> tuple[np.ndarray, list[str]]:
    sizes, names = [], []
    for entry in entries:
        size = entry.get("height"), entry.get("width")
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"image {entry['id']} of '{path}' has height and width {size}; they are pixels")
        if not isinstance(entry.get("file_name"), str):
            raise UserError(f"image {entry['id']} of '{path}' has no file_name; add it")
        sizes.append(size)
        names.append(entry["file_name"])
    return np.array(sizes, np.int32).reshape(-1, 2), names


def _box(entry: Mapping, path: str) -> tuple[np.ndarray, float]:
    """Returns the box of an annotation and its area; without one, that of the box."""
    try:
        box = np.array(entry.get("bbox"), np.float64)
        area = float(entry.get("area", box[2:].prod()))
    except (TypeError, ValueError, IndexError):
        box, area = np.empty(0), 0.0
    if box.shape != (4,) or not np.isfinite([*box, area]).all():
        raise _refused(
            entry,
            f"has the bbox {entry.get('bbox')} and the area {entry.get('area')}, not x, y, width, "
            "height and a number",
            path,
        )
    return box, area


def _refused(entry: Mapping, reason: str, path: str) -> UserError:
    return UserError(f"annotation {entry['id']} of '{path}' {reason}; correct or remove it")


def _warn_of_boxes_outside(boxes: np.ndarray, sizes: np.ndarray, path: str) -> None:
    # COCO's coordinates have two decimals, and the sum of two of them may be off by one.
    limits = sizes[:, ::-1] + 0.015
    outside = ((boxes[:, :2] < 0) | (boxes[:, :2] + boxes[:, 2:] > limits)).any(axis=1)
    if outside.any():
        tqdm.write(
            f"warning: {outside.sum()} boxes of '{path}' reach out of their images; training clips them",
            file=sys.stderr,
        )
