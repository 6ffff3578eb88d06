"""`cnx2 data`."""

import argparse
import json
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from cnx2_jax.commandline import count
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import check_new, replacing, to_path
from cnx2_jax.observe.grid import draw_sheet
from cnx2_jax.observe.pictures import check_picture, write_picture
from cnx2_jax.observe.progress import counted, say
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import Task, make_task
from cnx2_jax.train.step import batch_key

if TYPE_CHECKING:  # data needs TensorFlow, which --help should not wait for
    from cnx2_jax.data.pipeline import Examples
    from cnx2_jax.data.sources import Source

TAKES_OVERRIDES = True

COLUMNS = 8  # images per row; only images of the same row are mixed
SIZES_OF = 1000  # images whose sizes are read
TIMED_BATCH = 64
SAMPLE = 10_000
SHOWN_CLASSES = 3  # largest and smallest classes to list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME:RECIPE",
        help="as for train, NAME:RECIPE or FILE.py:RECIPE; change any key with --config.KEY=VALUE",
    )
    parser.add_argument(
        "--out",
        type=to_path,
        metavar="SHEET.png",
        help="the sheet of training images to write, by default none",
    )
    parser.add_argument(
        "--statistics",
        type=to_path,
        metavar="FILE.json",
        help="only compute mean, deviation, percentiles and extremes of each band of the training images, "
        "print them and write them to this new file, which data.statistics takes",
    )
    parser.add_argument(
        "--sample",
        type=count,
        default=SAMPLE,
        metavar="N",
        help=f"--statistics: images to read, spread over all; {SAMPLE:,} by default",
    )
    parser.add_argument("--rows", type=int, default=6, help=f"rows of {COLUMNS} images; 6 by default")
    parser.add_argument("--step", type=int, default=0, help="training step of the first row; 0 by default")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long to measure images/s; 5 by default, 0 to skip"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from cnx2_jax.data import inspection
    from cnx2_jax.data.pipeline import Examples

    if (args.out is None) == (args.statistics is None):
        raise UserError("give either --out, the sheet to write, or --statistics, the file to write")
    if args.statistics is not None:
        _measure(args, overrides)
        return
    check_picture(args.out)
    if not (1 <= args.rows <= 100 and 0 <= args.step < 2**31 and 0 <= args.seconds <= 3600):
        raise UserError(
            f"--rows {args.rows} must be 1 to 100, --step {args.step} at least 0, and --seconds "
            f"{args.seconds:g} 0 to 3600"
        )
    config = load_config(args.config, overrides)
    task = make_task(config)
    images = task.data
    if not isinstance(images, Examples):
        raise UserError(
            f"task '{config.task}' trains on features, not on images; give the config of another task"
        )
    for split, source in (("train", images.train), ("val", images.val)):
        _describe(split, source)

    rows = images.of_batch(COLUMNS)
    say("checking the order ...")
    checks = inspection.order_checks(
        images.num_train,
        config.seed,
        lambda step, host, hosts: rows.train_batches(step, process_index=host, process_count=hosts),
        epochs=config.data.get("sampling", "all") == "all",
    )
    for name, holds in checks.items():
        say(f"{'yes' if holds else 'NO '}  {name}")
    result: dict = {"num_train": images.num_train, "num_val": images.num_val}
    result["classes"] = len(images.class_names)
    if args.seconds:
        batches = images.of_batch(TIMED_BATCH).train_batches(args.step)
        result["images_per_sec"] = inspection.images_per_second(batches, args.seconds)
        say(f"{result['images_per_sec']:,.0f} images/s on this host")

    write_picture(_sheet(task, rows, args.step, args.rows), args.out)
    print(json.dumps({**result, "sheet": str(args.out)}))
    if not all(checks.values()):
        raise RunError("a check of the data order failed; please report this")


def _measure(args: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the statistics of the training images."""
    from cnx2_jax.data import statistics
    from cnx2_jax.data.sources import open_source

    check_new(args.statistics, "--statistics")
    config = load_config(args.config, overrides)
    source = open_source(config.data, "train", config.seed)
    images = min(args.sample, source.num_records)
    arrays = statistics.sample_arrays(source, config, args.sample)
    found = statistics.measure(source, config, counted(arrays, images, "statistics"))
    with replacing(args.statistics) as partial:
        partial.write_text(found.as_json())
    columns = (found.mean, found.std, found.least, found.low, found.high, found.most)
    rows = [
        [name, *(f"{column[place]:.6g}" for column in columns), f"{found.bad[place]:.2%}"]
        for place, name in enumerate(found.names)
    ]
    heads = ["band", "mean", "deviation", "least", "2%", "98%", "most", "bad values"]
    say(f"{found.images:,} images of {found.dtype}\n{markdown_table(heads, rows)}")
    for name in found.constant():
        say(f"band '{name}' is constant, so a run has to leave it out: data.use_bands")
    print(json.dumps({"statistics": str(args.statistics), "images": found.images, "bands": found.names}))


def _describe(split: str, source: "Source") -> None:
    from cnx2_jax.data import inspection
    from cnx2_jax.data.sizes import image_sizes

    counts = inspection.class_counts(source)
    what = "targets" if "value" in source.fields else "classes"
    line = f"{split}: {source.num_records:,} images, {len(source.class_names):,} {what}"
    if not source.num_records:
        say(line)
        return
    if counts is not None:
        order = np.argsort(-counts, kind="stable")
        shown = [*order[:SHOWN_CLASSES], *order[max(SHOWN_CLASSES, len(order) - SHOWN_CLASSES) :]]
        names = ", ".join(f"{source.class_names[label]}: {counts[label]:,}" for label in shown)
        line += f" of {counts.min():,} to {counts.max():,} images, median {np.median(counts):,.0f} ({names})"
    say(line)
    sizes = image_sizes(source, SIZES_OF)
    if len(sizes):
        heights, widths = np.percentile(sizes, [0, 50, 100], axis=0).T
        say(
            f"  of {len(sizes):,} of them: heights {heights[0]:.0f} to {heights[2]:.0f}, median "
            f"{heights[1]:.0f}; widths {widths[0]:.0f} to {widths[2]:.0f}, median {widths[1]:.0f}"
        )


def _sheet(task: Task, images: "Examples", step: int, rows: int) -> np.ndarray:
    """Draws training images as the model gets them, each row prepared as a batch of its own."""
    pictures, captions = [], []
    stream = images.train_batches(step)
    prepare = jax.jit(task.prepare)
    for row in range(step, step + rows):
        batch = next(stream)
        prepared = prepare(batch, batch_key(task.config.seed, jnp.int32(row)))
        drawn, lines = task.sheet(batch, prepared)
        pictures.append(drawn)
        captions += lines
    return draw_sheet(np.concatenate(pictures), captions, COLUMNS)
