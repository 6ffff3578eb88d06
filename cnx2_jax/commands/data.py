"""`cnx2 data`."""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cnx2_jax.configuration import load_config
from cnx2_jax.data import inspection
from cnx2_jax.data.images import ImageData
from cnx2_jax.data.sources import Source
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.models.pixels import denormalise
from cnx2_jax.observe.grid import draw_sheet
from cnx2_jax.observe.pictures import check_picture, write_picture
from cnx2_jax.observe.progress import say
from cnx2_jax.tasks import make_task
from cnx2_jax.train.step import batch_key
from cnx2_jax.train.task import Task

TAKES_OVERRIDES = True

COLUMNS = 8  # and images mixed with one another, in a row
SIZES_OF = 1000
TIMED_BATCH = 64
SHOWN_CLASSES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE:RECIPE",
        help="as for train; change it with --config.KEY=VALUE",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="SHEET.png", help="the sheet of training images to write"
    )
    parser.add_argument("--rows", type=int, default=6, help=f"of {COLUMNS} images each; 6 by default")
    parser.add_argument(
        "--step", type=int, default=0, help="the step at which the sheet begins; 0 by default"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long to measure images/s; 5 by default, 0: not at all"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    check_picture(args.out)
    if not (1 <= args.rows <= 100 and 0 <= args.step < 2**31 and 0 <= args.seconds <= 3600):
        raise UserError("--rows must be 1 to 100, --step at least 0, --seconds 0 to 3600")
    config = load_config(args.config, overrides)
    task = make_task(config)
    images = task.data
    if not isinstance(images, ImageData):
        raise UserError(f"task '{config.task}' trains on features, not on images; give a config of another")
    for split, source in (("train", images.train), ("val", images.val)):
        _describe(split, source)

    rows = images.of_batch(COLUMNS)
    say("checking the order ...")
    checks = inspection.order_checks(
        images.num_train,
        config.seed,
        lambda step, host, hosts: rows.train_batches(step, process_index=host, process_count=hosts),
    )
    for name, holds in checks.items():
        say(f"{'yes' if holds else 'NO '}  {name}")
    result: dict = {"num_train": images.num_train, "num_val": images.num_val}
    result["classes"] = len(images.class_names)
    if args.seconds:
        batches = images.of_batch(TIMED_BATCH).train_batches(args.step)
        result["images_per_sec"] = inspection.images_per_second(batches, args.seconds)
        say(f"{result['images_per_sec']:,.0f} images/s on this host")

    write_picture(_sheet(task, config, rows, args.step, args.rows), args.out)
    print(json.dumps({**result, "sheet": str(args.out)}))
    if not all(checks.values()):
        raise RunError("the order of the data is not what it must be; please report this")


def _describe(split: str, source: Source) -> None:
    counts = inspection.class_counts(source)
    line = f"{split}: {source.num_records:,} images, {len(source.class_names):,} classes"
    if not source.num_records:
        say(line)
        return
    if counts is not None:
        order = np.argsort(-counts, kind="stable")
        shown = [*order[:SHOWN_CLASSES], *order[max(SHOWN_CLASSES, len(order) - SHOWN_CLASSES) :]]
        names = ", ".join(f"{source.class_names[label]}: {counts[label]:,}" for label in shown)
        line += f" of {counts.min():,} to {counts.max():,} images, median {np.median(counts):,.0f} ({names})"
    say(line)
    sizes = inspection.image_sizes(source, SIZES_OF)
    if len(sizes):
        heights, widths = np.percentile(sizes, [0, 50, 100], axis=0).T
        say(
            f"  of {len(sizes):,} of them: heights {heights[0]:.0f} to {heights[2]:.0f}, median "
            f"{heights[1]:.0f}; widths {widths[0]:.0f} to {widths[2]:.0f}, median {widths[1]:.0f}"
        )


def _sheet(task: Task, config: ConfigDict, images: ImageData, step: int, rows: int) -> np.ndarray:
    """Draws training images as the model gets them, each row mixed as a batch of its own."""
    pictures, captions = [], []
    stream = images.train_batches(step)
    prepare = jax.jit(task.prepare)
    for row in range(step, step + rows):
        batch = next(stream)
        prepared = prepare(batch, batch_key(config.seed, jnp.int32(row)))
        shown = prepared["image"]
        if shown.dtype != jnp.uint8:
            shown = denormalise(shown, config.data.mean, config.data.std)
        pictures.append(np.asarray(shown))
        for index, label in enumerate(batch["label"]):
            names = images.class_names
            if "target" in prepared:
                captions.append(
                    _caption(np.asarray(prepared["target"][index]), names, config.label_smoothing)
                )
            else:
                captions.append(names[label] if names else "")
    return draw_sheet(np.concatenate(pictures), captions, COLUMNS)


def _caption(target: np.ndarray, names: tuple[str, ...], smoothing: float) -> str:
    """Names one class, or the two that were mixed with their shares."""
    shares = (target - smoothing / len(target)) / (1 - smoothing)
    first, second = np.argsort(-shares, kind="stable")[:2]
    if shares[second] < 0.005:
        return names[first]
    return f"{names[first]} {shares[first]:.0%}, {names[second]} {shares[second]:.0%}"
