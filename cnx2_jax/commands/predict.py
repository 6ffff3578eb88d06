"""`cnx2 predict`."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from cnx2_jax.data.imagenet import describe
from cnx2_jax.data.images import eval_batches
from cnx2_jax.data.sources.folder import open_files
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import feature_file
from cnx2_jax.evaluation.features import predictions
from cnx2_jax.observe.progress import say, watched
from cnx2_jax.tasks import models, weights

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a workdir, its checkpoints/STEP, or an exported checkpoint",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to name; 5 by default")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print a line an image: {"image": ..., "predictions": [{"class", "name", "probability"}, ...]}',
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="OUT.npy",
        help="also write a feature vector an image (float32, [images, dim], what the head sees), and "
        "OUT.json, the list of the images; works on pretraining too, where no classes are named",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="32 by default")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG or WebP files, or folders: all such files below them, sorted",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if args.features is not None:
        feature_file.check(args.features)
    source = open_files(args.images)
    model, config, class_names = weights.load(args.checkpoint)
    if not class_names and args.features is None:
        kind = "is of pretraining and" if config.task == "pretrain" else "has no head and"
        raise UserError(
            f"checkpoint '{args.checkpoint}' {kind} names no classes; fine-tune it first, or write --features"
        )
    config.batch_size = min(args.batch_size, source.num_records)
    config.data.unreadable = "error"  # whatever training did: nobody would miss an image that was left out
    model = models.without_decoder(model)
    paths = [source.describe(index) for index in range(source.num_records)]
    batches = watched(eval_batches(source, config), source.num_records)
    show = _json_line if args.json else _table(class_names)
    with contextlib.ExitStack() as stack:
        write = None
        if args.features is not None:
            write = stack.enter_context(feature_file.writer(args.features, paths, model.dims[-1]))
        rest = iter(paths)
        for vectors, shares in predictions(model, config, batches):
            if write is not None:
                write(vectors)
            if class_names:
                # The paths second, as zip takes from the first before it sees that it is at an end.
                for row, path in zip(shares, rest, strict=False):
                    top = [(class_names[i], float(row[i])) for i in row.argsort()[::-1][: args.top]]
                    tqdm.write(show(path, top))  # above a progress bar, if there is one
                sys.stdout.flush()
    if args.features is not None:
        say(f"wrote {args.features}, its rows named in {feature_file.names_path(args.features)}")


def _json_line(path: str, top: list[tuple[str, float]]) -> str:
    predictions = [{"class": name, "name": describe(name), "probability": share} for name, share in top]
    return json.dumps({"image": path, "predictions": predictions})


def _shown(name: str) -> str:
    name = os.fsencode(name).decode(errors="replace")  # a name that is no text could not be printed
    return name if name == describe(name) else f"{name} {describe(name)}"


def _table(class_names: Sequence[str]) -> Callable[[str, list[tuple[str, float]]], str]:
    """Shows an image as its path and a row a class, in columns that hold the longest name."""
    shown = {name: _shown(name) for name in class_names}
    width = max(map(len, shown.values()), default=0)

    def table(path: str, top: list[tuple[str, float]]) -> str:
        path = os.fsencode(path).decode(errors="replace")  # a name that is no text could not be printed
        return "\n".join([path, *(f"  {shown[name]:<{width}}  {share:6.2%}" for name, share in top)])

    return table
