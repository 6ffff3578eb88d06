"""Detection's input: its speed against a loop of Pillow and pycocotools, and the error of cropped masks.

  python -m experiments.benchmarks.detection_data                  # both: a few minutes
  python -m experiments.benchmarks.detection_data speed --rounds 3 --images 64    # a quick look

Sections:
  speed   images/s on one core from 640x480 JPEGs with 7 polygons each to large-scale jitter at 1024 pixels,
          in turns with a loop that resizes, crops and mirrors image and full masks
  masks   the share of 28x28 mask targets that change if they are computed from masks that are cropped to
          their boxes and resampled to 112x112, instead of from full masks, by size of the object

Each section writes SECTION.json and a table SECTION.md into the folder --out.
"""

import argparse
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.data.encoded_masks import crop_masks, encode_mask
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import defaults

HEIGHT, WIDTH, OBJECTS, POINTS = 480, 640, 7, 40
PHOTOGRAPHS, BATCH = 32, 8
CELLS = 28  # of a mask target
SIZES = {"small": (4, 32), "medium": (32, 96), "large": (96, 800)}  # sides in pixels, as COCO divides them


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "detection_data")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.detection_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark_detection"), help="folder; %(default)s by default"
    )
    parser.add_argument("--rounds", type=count, default=9, help="speed: turns; %(default)s by default")
    parser.add_argument(
        "--images", type=count, default=128, help="speed: images per turn; %(default)s by default"
    )
    parser.add_argument("--image-size", type=count, default=1024, help="pixels; %(default)s by default")
    parser.add_argument(
        "--objects", type=count, default=300, help="masks: objects per size; %(default)s by default"
    )
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            raise UserError(
                f"unknown section '{section}'{nearest(section, SECTIONS)} (known: {', '.join(SECTIONS)})"
            )
    return args


def _run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.sections or SECTIONS:
        begin = time.monotonic()
        records, table = SECTIONS[section](args)
        print(f"{section}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        content = {"arguments": vars(args) | {"out": str(args.out)}, "records": records}
        (args.out / f"{section}.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.out / f"{section}.md").write_text(table + "\n")
        print(table)


def _outline(rng: np.random.Generator, centre: np.ndarray, radii: np.ndarray) -> list[float]:
    """Returns a random, partly concave outline, x0, y0, x1 ... with two decimals as in COCO's files."""
    angles = np.arange(POINTS) / POINTS * 2 * np.pi
    bumps = np.zeros(POINTS)
    for waves in (2, 3, 5, 9):
        bumps += rng.uniform(0, 0.25) * np.cos(waves * angles + rng.uniform(0, 6))
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (0.75 + bumps / 2)[:, None]
    return (centre + ring * radii).round(2).reshape(-1).tolist()


def _write_set(root: Path) -> None:
    """Writes parts of scikit-learn's two photographs as JPEGs, with outlines, in COCO's format."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(PHOTOGRAPHS):
        left, top = rng.integers(0, 100, 2).tolist()
        part = photographs[number % 2].crop((left, top, left + 500, top + 320))
        part.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(
            root / f"train2017/{number}.jpg", quality=92
        )
        images.append({"id": number, "height": HEIGHT, "width": WIDTH, "file_name": f"{number}.jpg"})
        for _ in range(OBJECTS):
            # The median object of COCO is about 60 pixels wide.
            radii = np.exp(rng.normal(np.log(30), 0.9, 2)).clip(4, 220)
            outline = _outline(rng, rng.uniform((0, 0), (WIDTH, HEIGHT)), radii)
            points = np.reshape(outline, (-1, 2)).clip(0, (WIDTH, HEIGHT))
            corner, sides = points.min(axis=0), np.ptp(points, axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                    "bbox": [*corner.tolist(), *sides.tolist()], "area": float(sides.prod()),
                    "segmentation": [points.reshape(-1).tolist()],
                }
            )  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


class _Peer:
    """The loop that projects write by hand: Pillow for the image, pycocotools and Pillow for full masks."""

    def __init__(self, root: Path, size: int):
        from pycocotools.coco import COCO

        self.size, self.rng = size, np.random.default_rng(0)
        content = json.loads((root / "annotations/instances_train2017.json").read_text())
        self.coco = COCO()
        self.coco.dataset = content
        sys.stdout, stdout = io.StringIO(), sys.stdout  # it prints
        self.coco.createIndex()
        sys.stdout = stdout
        self.files = [(root / "train2017" / image["file_name"]).read_bytes() for image in content["images"]]

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from PIL import Image

        size = self.size
        image = Image.open(io.BytesIO(self.files[number % PHOTOGRAPHS])).convert("RGB")
        factor = min(size / WIDTH, size / HEIGHT) * self.rng.uniform(0.1, 2)
        height, width = round(HEIGHT * factor), round(WIDTH * factor)
        top, left = (int(self.rng.integers(0, max(side - size, 0) + 1)) for side in (height, width))
        flipped = self.rng.random() < 0.5

        def moved(picture: Image.Image, kernel: Image.Resampling) -> np.ndarray:
            # Resizing the window alone, which is what Pillow can do to save time.
            bottom, right = min(top + size, height), min(left + size, width)
            box = left / factor, top / factor, min(right / factor, WIDTH), min(bottom / factor, HEIGHT)
            part = np.asarray(picture.resize((right - left, bottom - top), kernel, box=box))
            return part[:, ::-1] if flipped else part

        canvas = np.zeros((size, size, 3), np.uint8)
        pixels = moved(image, Image.Resampling.BILINEAR)
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        masks, boxes = [], []
        for annotation in self.coco.imgToAnns[number % PHOTOGRAPHS]:
            mask = moved(Image.fromarray(self.coco.annToMask(annotation)), Image.Resampling.NEAREST)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if rows.size:
                masks.append(mask)
                boxes.append([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
        return canvas, np.array(boxes, np.float32), np.array(masks)


def _speed(args: argparse.Namespace) -> tuple[list[dict], str]:
    # Before TensorFlow starts its threads.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from cnx2_jax.data.detection import DetectionData
    from cnx2_jax.data.detection_keys import add_detection_keys

    root = args.out.absolute() / "set"
    _write_set(root)
    config = defaults("classify")
    add_detection_keys(config.data)
    config.update({"batch_size": BATCH, "image_size": (args.image_size,) * 2})
    config.data.update({"source": "coco", "root": str(root), "val_images": "train2017"})
    data, peer = DetectionData(config), _Peer(root, args.image_size)
    batches = max(1, args.images // BATCH)

    def ours() -> float:
        stream = data.train_batches(0)
        for _ in range(4):  # those that are prefetched
            next(stream)
        begin = time.perf_counter()
        for _ in range(batches):
            next(stream)
        rate = batches * BATCH / (time.perf_counter() - begin)
        stream.close()  # type: ignore[attr-defined]  # so that nothing is prefetched during the peer's turn
        return rate

    def theirs() -> float:
        begin = time.perf_counter()
        for number in range(args.images):
            peer.example(number)
        return args.images / (time.perf_counter() - begin)

    turns = [[ours(), theirs()] for _ in range(args.rounds)]
    rates = [statistics.median(rates) for rates in zip(*turns, strict=True)]
    ratio = statistics.median(one / other for one, other in turns)
    table = markdown_table(
        ["images/s on one core", "cnx2", "Pillow and pycocotools", "ratio"],
        [[f"jitter at {args.image_size}", *(f"{rate:.1f}" for rate in rates), f"{ratio:.2f}x"]],
    )
    return [{"ratio": ratio, "turns": turns}], table


def _masks(args: argparse.Namespace) -> tuple[list[dict], str]:
    from cnx2_jax.data.encoded_masks import decode_mask, encode_polygons

    rng = np.random.default_rng(0)
    canvas, records = args.image_size, []
    places = np.arange(canvas)
    for name, (least, most) in SIZES.items():
        wrong, worst, targets = 0.0, 0.0, 0
        for _ in range(args.objects):
            side = np.exp(rng.uniform(np.log(least), np.log(min(most, canvas))))
            radii = side / 2 * rng.uniform(0.6, 1, 2)
            outline = _outline(rng, rng.uniform(side / 3, canvas - side / 3, 2), radii)
            encoded = encode_polygons([outline])
            full = decode_mask(encoded, (canvas, canvas))
            boxes, crops, found = crop_masks(
                [encode_mask(full > 0)], np.array([canvas] * 2), places, places, 112
            )
            if not found[0]:
                continue
            box = boxes[0].astype(np.float64)
            sides = box[2:] - box[:2]
            # Proposals that overlap the object by half or more.
            proposal = box + np.tile(sides, 2) * rng.uniform(-0.15, 0.15, 4)
            exact = _target(full, proposal) >= 0.5
            inside = (proposal.reshape(2, 2) - box[:2]) / sides * crops.shape[1]
            compact = _target(crops[0], inside.reshape(-1)) >= 0.5
            difference = (exact != compact).mean()
            wrong, worst, targets = wrong + difference, max(worst, difference), targets + 1
        records.append({"size": name, "mean": wrong / targets, "worst": worst, "targets": targets})
    rows = [[each["size"], f"{each['mean']:.2%}", f"{each['worst']:.1%}"] for each in records]
    return records, markdown_table(["objects", "cells that differ", "in the worst target"], rows)


def _target(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns RoIAlign of a mask, float64 [CELLS, CELLS]: aligned, as many samples as a cell has pixels."""
    rows, columns = (_averages(mask.shape[axis], box[axis], box[axis + 2]) for axis in (0, 1))
    return rows @ mask @ columns.T


def _averages(length: int, begin: float, end: float) -> np.ndarray:
    """Returns the weight of each pixel in each cell between `begin` and `end`, [CELLS, length]."""
    samples = max(1, math.ceil((end - begin) / CELLS))
    places = begin + (np.arange(CELLS * samples) + 0.5) * (end - begin) / (CELLS * samples) - 0.5
    inside = (places >= -1) & (places <= length)
    weights = np.maximum(1 - np.abs(places.clip(0, length - 1)[:, None] - np.arange(length)), 0)
    return (weights * inside[:, None]).reshape(CELLS, samples, length).mean(axis=1)


SECTIONS: dict[str, Callable] = {"speed": _speed, "masks": _masks}


if __name__ == "__main__":
    sys.exit(main())
