"""`cnx2 predict`."""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import feature_file
from cnx2_jax.files import check_new, creating, local_path, to_path
from cnx2_jax.observe.progress import say
from cnx2_jax.tasks import Task, models, weights
from cnx2_jax.tasks.base import TTA, TTA_HELP, use_tta

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=to_path,
        help="a workdir, its checkpoints/STEP, or an exported checkpoint",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of classes to print; 5 by default"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one JSON line per image: {"image": ..., "predictions": '
        '[{"class", "name", "probability"}, ...]}; for several labels {"class", "probability", "predicted"}; '
        'for regression {"image": ..., "values": {TARGET: VALUE}}; for segmentation {"image": ..., "shares": '
        '{CLASS: SHARE}}; for detection {"image": ..., "objects": [{"class", "name", "score", "bbox", '
        '"segmentation"}, ...]}, the last two as in COCO\'s files',
    )
    parser.add_argument(
        "--features",
        type=to_path,
        metavar="OUT.npy",
        help="also write one feature vector per image (float32 [images, dim], the head's input), and "
        "OUT.json, the list of the images; works for pretraining runs too, which have no classes",
    )
    parser.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="write pictures of the predictions into a new folder; for segmentation: NAME.overlay.png, and "
        "NAME.map.png, whose pixels are class numbers; for detection: NAME.objects.png",
    )
    parser.add_argument(
        "--heatmap",
        type=to_path,
        metavar="FOLDER",
        help="draw where an image raises its most probable class, or each of its predicted values, into a "
        "new folder: NAME.heatmap.png (Grad-CAM of the last stage)",
    )
    parser.add_argument("--tta", choices=TTA, help=TTA_HELP)
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="images per batch; 32 by default"
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=local_path,
        metavar="IMAGE",
        help="JPEG, PNG or WebP files (for a run on arrays: .npy, .npz, .tif or .png), or folders: all such "
        "files in them and their sub-folders, sorted",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    # TensorFlow, which data needs, takes seconds to import; --help should not wait for it.
    from cnx2_jax.data.sources import open_paths

    for name, value in (("--top", args.top), ("--batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if args.features is not None:
        feature_file.check(args.features)
    for option, path in (("--out", args.out), ("--heatmap", args.heatmap)):
        if path is not None:
            check_new(path, option)
    model, task = weights.load_task(args.checkpoint)
    source = open_paths(args.images, task.config.data)
    _check_options(args, task)
    use_tta(task.config, args.tta)
    paths = [source.describe(index) for index in range(source.num_records)]
    with contextlib.ExitStack() as stack:
        write = None
        if args.features is not None:
            write = stack.enter_context(
                feature_file.writer(args.features, paths, models.without_decoder(model).config.dims[-1])
            )
        if args.out is not None:
            names = _unique_names(paths)
            folder = stack.enter_context(creating(args.out))
            folder.mkdir()
        for index, outputs in enumerate(task.predict(model, source, args.batch_size)):
            if write is not None:
                write(outputs["features"][None])
            if args.out is not None:
                for name, picture in task.prediction_pictures(outputs).items():
                    picture.save(folder / f"{names[index]}.{name}.png")
            if task.class_names:
                prediction = task.prediction(outputs, args.top)
                if args.json:
                    text = json.dumps({"image": paths[index], **prediction})
                else:
                    shown = os.fsencode(paths[index]).decode(errors="replace")  # need not be valid text
                    text = "\n".join([shown, *task.prediction_lines(prediction)])
                tqdm.write(text)  # above a progress bar, if there is one
                sys.stdout.flush()
    if args.heatmap is not None:
        with creating(args.heatmap) as folder:
            folder.mkdir()
            every = task.heatmaps(model, source, args.batch_size)
            for name, pictures in zip(_unique_names(paths), every, strict=True):
                for kind, picture in pictures.items():
                    picture.save(folder / f"{name}.{kind}.png")
        say(f"drew the heat maps into {args.heatmap}")
    if args.features is not None:
        say(f"wrote {args.features}, and the names of its rows to {feature_file.names_path(args.features)}")
    if args.out is not None:
        say(f"wrote the pictures to {args.out}")


def _check_options(args: argparse.Namespace, task: Task) -> None:
    """Raises UserError if the task cannot give what the options ask for."""
    if not task.class_names and args.features is None:
        kind = "is of pretraining" if task.config.task == "pretrain" else "has no head"
        raise UserError(
            f"checkpoint '{args.checkpoint}' {kind} and so has no classes; fine-tune it first, or "
            "give --features"
        )
    if args.features is not None and not task.gives_features:
        raise UserError(f"--features: task '{task.config.task}' has no feature vectors; leave it out")
    if args.heatmap is not None and not (task.gives_heatmaps and task.class_names):
        raise UserError(f"--heatmap: task '{task.config.task}' has no outputs to explain; leave it out")
    if args.tta is not None and args.features is not None:
        raise UserError("--features are of the image alone, and --tta averages two views; give only one")
    if args.out is not None and not task.gives_pictures:
        raise UserError(f"--out: task '{task.config.task}' draws no pictures; leave it out")


def _unique_names(paths: list[str]) -> list[str]:
    """Returns the names of the files without folder and suffix, numbered where they repeat."""
    names: dict[str, None] = {}  # in order
    for path in paths:
        stem = Path(path).stem
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names[next(name for name in candidates if name not in names)] = None
    return list(names)
