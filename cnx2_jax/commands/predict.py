"""`cnx2 predict`."""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

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
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of classes to print; 5 by default"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one JSON line per image: {"image": ..., "predictions": '
        '[{"class", "name", "probability"}, ...]}',
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="OUT.npy",
        help="also write one feature vector per image (float32 [images, dim], the head's input), and "
        "OUT.json, the list of the images; works for pretraining runs too, which have no classes",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images per batch; 32 by default"
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG or WebP files, or folders: all such files in them and their sub-folders, sorted",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    # TensorFlow, which data needs, takes seconds to import; --help should not wait for it.
    from cnx2_jax.data.images import eval_batches
    from cnx2_jax.data.sources.folder import open_files

    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if args.features is not None:
        feature_file.check(args.features)
    source = open_files(args.images)
    model, task = weights.load_task(args.checkpoint)
    config, class_names = task.config, task.class_names
    if not class_names and args.features is None:
        kind = "is of pretraining" if config.task == "pretrain" else "has no head"
        raise UserError(
            f"checkpoint '{args.checkpoint}' {kind} and so has no classes; fine-tune it first, or "
            "give --features"
        )
    config.batch_size = min(args.batch_size, source.num_records)
    config.data.unreadable = "error"  # training may skip images, but here every image must give a result
    model = models.without_decoder(model)
    paths = [source.describe(index) for index in range(source.num_records)]
    batches = watched(eval_batches(source, config), source.num_records)
    with contextlib.ExitStack() as stack:
        write = None
        if args.features is not None:
            write = stack.enter_context(feature_file.writer(args.features, paths, model.config.dims[-1]))
        rest = iter(paths)
        for vectors, probabilities in predictions(model, config, batches):
            if write is not None:
                write(vectors)
            if class_names:
                # `rest` is the second argument, as zip takes one more item from the first before it stops.
                for row, path in zip(probabilities, rest, strict=False):
                    prediction = task.prediction({"probability": row}, args.top)
                    if args.json:
                        text = json.dumps({"image": path, **prediction})
                    else:
                        shown = os.fsencode(path).decode(errors="replace")  # a path need not be valid text
                        text = "\n".join([shown, *task.prediction_lines(prediction)])
                    tqdm.write(text)  # above a progress bar, if there is one
                sys.stdout.flush()
    if args.features is not None:
        say(f"wrote {args.features}, and the names of its rows to {feature_file.names_path(args.features)}")
