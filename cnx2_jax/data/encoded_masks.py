"""Masks of objects as short byte strings: polygons, or run lengths in COCO's compressed form.

A mask of 640x480 pixels takes 300 kB, its outline about 200 bytes. Sources keep the bytes in memory, and each
example rasterises its own. Pixels are those of pycocotools, to the last one.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from pycocotools import mask as coco_mask

Rle = dict[str, Any]  # {"size": [height, width], "counts": bytes}, as pycocotools takes it

_POLYGONS, _RUNS = b"P", b"R"
_LEAST_NUMBERS = 6  # of a polygon: three points


def encode_polygons(polygons: Sequence[Sequence[float]]) -> bytes:
    """Encodes the union of polygons, each x0, y0, x1, y1 ... in pixels.

    Raises:
      ValueError: there is none, or one is not a list of finite numbers, an even number of them, at least 6;
        the message is a predicate.
    """
    if not polygons:
        raise ValueError("has no polygon")
    parts = []
    for polygon in polygons:
        try:
            part = np.array(polygon, np.float64)
        except (TypeError, ValueError):
            raise ValueError("has a polygon that is not a list of numbers") from None
        if part.ndim != 1 or part.size < _LEAST_NUMBERS or part.size % 2:
            raise ValueError(
                f"has a polygon of {part.size} numbers, not x and y of {_LEAST_NUMBERS // 2} or more points"
            )
        if not np.isfinite(part).all():
            raise ValueError("has a polygon with numbers that are not finite")
        parts.append(part)
    lengths = struct.pack(f"<{len(parts) + 1}I", len(parts), *(part.size for part in parts))
    return _POLYGONS + lengths + b"".join(part.astype("<f8").tobytes() for part in parts)


def encode_runs(counts: Sequence[int] | str | bytes, size: tuple[int, int]) -> bytes:
    """Encodes run lengths, down the columns from the top left, background first.

    Args:
      counts: whole numbers, or COCO's compressed string.
      size: height and width of the image.

    Raises:
      ValueError: they are not run lengths of that many pixels; the message is a predicate.
    """
    if isinstance(counts, str | bytes):
        compressed = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
        runs = _runs_of(compressed)
    else:
        runs = np.array(counts)
        if runs.ndim != 1 or runs.dtype.kind not in "iu":
            raise ValueError("has run lengths that are not whole numbers")
        compressed = None
    if runs.size == 0 or runs.min() < 0 or runs.sum() != size[0] * size[1]:
        raise ValueError(f"has run lengths of {runs.sum()} pixels, not of {size[0]} x {size[1]}")
    return _RUNS + (_compressed(runs, size) if compressed is None else compressed)


def encode_mask(mask: Bool[np.ndarray, "height width"]) -> bytes:
    """Encodes the pixels of a mask."""
    return _RUNS + coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]


def region_runs(region: Bool[np.ndarray, "h w"], top: int, left: int, size: tuple[int, int]) -> bytes:
    """Encodes a mask that is empty outside of a region, without making the whole of it.

    Args:
      region: its pixels.
      top, left: where the region lies in the image.
      size: height and width of the image.

    Returns:
      COCO's compressed string.
    """
    edges = np.diff(np.pad(region.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (column, begin), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    offset = (left + column) * size[0] + top
    # Starts and ends of runs in turn; where one column ends and the next begins with the object, both go.
    places = np.stack([offset + begin, offset + end], axis=1).reshape(-1)
    joined = np.flatnonzero(places[1:-1:2] == places[2::2])
    places = np.delete(places, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(places, prepend=0, append=size[0] * size[1])
    return _compressed(counts[:-1] if counts[-1] == 0 else counts, size)


def to_rle(encoded: bytes, size: tuple[int, int]) -> Rle:
    """Returns an encoded mask as pycocotools's run lengths, for an image of that height and width."""
    if encoded[:1] == _RUNS:
        return {"size": list(size), "counts": encoded[1:]}
    (count,) = struct.unpack_from("<I", encoded, 1)
    lengths = struct.unpack_from(f"<{count}I", encoded, 5)
    numbers = np.frombuffer(encoded, "<f8", offset=5 + 4 * count)
    polygons = np.split(numbers, np.cumsum(lengths)[:-1])
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def decode_mask(encoded: bytes, size: tuple[int, int]) -> UInt8[np.ndarray, "height width"]:
    """Returns the pixels of an encoded mask, 0 or 1."""
    return _columns(to_rle(encoded, size), 0, size[1])


def crop_masks(
    encoded: Sequence[bytes],
    size: Int[np.ndarray, "2"],
    rows: Int[np.ndarray, " height"],
    columns: Int[np.ndarray, " width"],
    side: int,
) -> tuple[Float32[np.ndarray, "n 4"], UInt8[np.ndarray, "n side side"], Bool[np.ndarray, " n"]]:
    """Moves masks by a geometry, and crops each to its own box.

    Args:
      encoded: n masks.
      size: height and width of their image.
      rows, columns: the row and the column of the image that each row and column of the result shows.
      side: to which the crops are resampled. Along an axis of fewer pixels, values are interpolated as
        RoIAlign does to full masks, and those from 0.5 on are 1; along others, the nearest pixel is taken.

    Returns:
      The boxes of the moved masks, y0, x0, y1, x1; the masks in them, 0 or 1; and which masks have a pixel
      left. Boxes and masks of the others are 0.
    """
    boxes = np.zeros((len(encoded), 4), np.float32)
    crops = np.zeros((len(encoded), side, side), np.uint8)
    height, width = (int(length) for length in size)
    for box, crop, mask in zip(boxes, crops, encoded, strict=True):
        rle = to_rle(mask, (height, width))
        x, y, across, down = coco_mask.toBbox(rle)
        row = np.flatnonzero((rows >= y) & (rows < y + down))
        column = np.flatnonzero((columns >= x) & (columns < x + across))
        if not row.size or not column.size:
            continue
        left, right = int(x), int(x + across)
        pixels = _columns(rle, left, right)
        # Enlarging repeats rows and columns; one of each tells where the object is.
        distinct = _distinct(rows[row]), _distinct(columns[column])
        seen = pixels[distinct[0]][:, distinct[1] - left] > 0
        if not seen.any():
            continue
        y0, y1 = _extent(rows, row, distinct[0][seen.any(axis=1)])
        x0, x1 = _extent(columns, column, distinct[1][seen.any(axis=0)])
        box[:] = y0, x0, y1, x1
        crop[:] = _resampled(pixels, rows[y0:y1], columns[x0:x1] - left, side)
    return boxes, crops, boxes[:, 2] > 0


def _columns(rle: Rle, first: int, last: int) -> UInt8[np.ndarray, "height columns"]:
    """Returns the columns [first, last) of a mask, 0 or 1; the others cost nothing."""
    height, runs = rle["size"][0], _runs_of(rle["counts"])
    ends = np.cumsum(runs).clip(first * height, last * height)
    values = (np.arange(runs.size) & 1).astype(np.uint8)
    shown = ends.copy()
    shown[1:] -= ends[:-1]
    shown[0] -= first * height
    pixels = np.repeat(values, shown)
    return pixels.reshape(last - first, height).T


def _distinct(places: np.ndarray) -> np.ndarray:
    """Returns places, rising or falling, without repetitions."""
    return places[np.concatenate([[True], places[1:] != places[:-1]])]


def _extent(sources: np.ndarray, places: np.ndarray, seen: np.ndarray) -> tuple[int, int]:
    """Returns the first of `places` and the one after the last which show one of `seen`."""
    shown = places[(sources[places] == seen[0]) | (sources[places] == seen[-1])]
    return int(shown[0]), int(shown[-1]) + 1


def _resampled(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray, side: int) -> np.ndarray:
    """Returns the mask that shows these rows and columns of `pixels`, bool [side, side]."""
    tall, wide = len(rows) >= side, len(columns) >= side
    if tall:
        rows = rows[_centres(len(rows), side)]
    if wide:
        columns = columns[_centres(len(columns), side)]
    values = pixels[rows][:, columns]
    # Not as products of matrices: BLAS has threads of its own, which fight with those that read.
    if not tall:
        (before, after), weights = _neighbours(values.shape[0], side)
        values = values[before] * weights[0][:, None] + values[after] * weights[1][:, None]
    if not wide:
        (before, after), weights = _neighbours(values.shape[1], side)
        values = values[:, before] * weights[0] + values[:, after] * weights[1]
    return values >= 0.5


def _centres(length: int, count: int) -> np.ndarray:
    """Returns the pixels in which the centres of `count` equal parts of an axis lie."""
    return ((np.arange(count) + 0.5) * (length / count)).astype(np.int64)


@functools.cache
def _neighbours(length: int, count: int) -> tuple[Int[np.ndarray, "2 count"], Float32[np.ndarray, "2 count"]]:
    """Returns the two pixels beside the centres of `count` equal parts of an axis, and their weights.

    What lies beyond the axis is 0.
    """
    places = (np.arange(count) + 0.5) * (length / count) - 0.5
    first = np.floor(places).astype(np.int64)
    pixels = np.stack([first, first + 1])
    weights = np.stack([1 - (places - first), places - first])
    inside = (pixels >= 0) & (pixels < length)
    return pixels.clip(0, length - 1), (weights * inside).astype(np.float32)


def _compressed(runs: np.ndarray, size: tuple[int, int]) -> bytes:
    return coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)["counts"]


def _runs_of(compressed: bytes) -> Int[np.ndarray, " runs"]:
    """Returns the run lengths of COCO's compressed string; pycocotools would read beyond a damaged one.

    A run is the difference to the one before the last, from the fourth on, as signed groups of five bits, the
    lowest first; bit 5 says that another group follows, and 48 is added to all.
    """
    groups = np.frombuffer(compressed, np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError("has a string of run lengths that is damaged")
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:
        raise ValueError("has a string of run lengths that is damaged")
    shifts = 5 * (np.arange(groups.size) - np.repeat(starts, lengths))
    values = np.add.reduceat((groups & 31) << shifts, starts)
    values -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values
