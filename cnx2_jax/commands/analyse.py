"""`cnx2 analyse`."""

import argparse
import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation import analysis, analysis_report, report
from cnx2_jax.evaluation.analysis import Layer
from cnx2_jax.files import check_new, creating, to_path
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.progress import say, watched
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import Task, make_task, models, weights
from cnx2_jax.train import sharding

TAKES_OVERRIDES = True

IMAGES = 1000  # as in the paper (section 3)
DRAWN = 4  # images whose activation maps are drawn
AT_ONCE = 32  # images per device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=to_path,
        metavar="PATH",
        help="a run, a checkpoint or converted weights; give the option once per checkpoint to compare. "
        "Each is measured on the validation images of its own config, changed by --config.KEY=VALUE",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=to_path,
        metavar="FOLDER",
        help="a new folder for analysis.json, tables, plots and activation maps",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        metavar="N",
        help="how many validation images to use, evenly spaced over all (%(default)s, or all if there are "
        "fewer)",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="draw the activation maps of this layer: stages.2.5 is the output of block 5 of stage 2, and "
        "stages.2.5.grn its hidden map after GRN; give the option once per layer. By default both of the "
        "last block of every stage",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    check_new(args.out, "--out")
    if args.images < 1:
        raise UserError(f"--images {args.images} must be at least 1")
    if len(args.checkpoint) > len(string.ascii_uppercase):
        raise UserError(f"{len(args.checkpoint)} checkpoints: give at most {len(string.ascii_uppercase)}")
    # Before the first pass, so that no mistake in a later checkpoint costs the work on an earlier one.
    subjects = [_open(path, overrides, args.layer) for path in args.checkpoint]
    found: dict[str, dict[str, Layer]] = {}
    pictures: dict[str, np.ndarray] = {}
    summaries = []
    for label, path, (task, model, mesh, names) in zip(
        string.ascii_uppercase, args.checkpoint, subjects, strict=False
    ):
        source, classes = _images(task, args.images)
        count, found[label] = _measure(task, model, mesh, source, classes, f"analysing {label}")
        pictures |= _draw(task, model, source, names, f"activations/{label}")
        measured = {name: layer.as_json() for name, layer in found[label].items()}
        summary = {"label": label, "checkpoint": str(checkpoint.find(path)), "task": task.config.task}
        summaries.append({**summary, "images": count, "layers": measured})
        say(f"{label}: {path}, task {task.config.task}, {count} images")
        if all(layer.selectivity is None for layer in found[label].values()):
            say(f"{label}: no selectivity, because the images do not have labels of two classes or more")
    made = analysis_report.make_report(found, pictures)
    with creating(args.out) as partial:
        lines = report.write_report(partial, made)
        text = json.dumps({"checkpoints": summaries}, indent=1)
        (partial / "analysis.json").write_text(text + "\n", encoding="utf-8")
    for line in lines:
        say(line.replace(str(partial), str(args.out)))
    print(markdown_table(*made.tables["layers"]))


def _open(path: Path, overrides: list[str], wanted: list[str]) -> tuple[Task, ConvNeXtV2, Mesh, list[str]]:
    """Returns a checkpoint's task with its data, its encoder on the mesh, the mesh, and layers to draw."""
    model, config, _ = weights.load(path)
    if not hasattr(model, "encoder_prefix"):
        raise UserError(f"checkpoint '{path}' of task '{config.task}' has no ConvNeXt V2 encoder to analyse")
    config = override(config, overrides)
    mesh = sharding.make_mesh(config.mesh)
    config.batch_size = AT_ONCE * mesh.size
    graph, params = split(models.without_decoder(model))
    model = merge(graph, sharding.put_params(params, mesh))
    known = analysis.layer_names(model)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"checkpoint '{path}' has no layer '{name}'{nearest(name, known)}; layers are named as "
                f"{known[-1]} or {known[-2]}"
            )
    last = [f"stages.{stage}.{depth - 1}" for stage, depth in enumerate(model.config.depths)]
    names = wanted or [name + end for name in last for end in (analysis.HIDDEN, "")]
    return make_task(config), model, mesh, names


def _images(task: Task, count: int) -> tuple[Any, int]:
    """Returns up to `count` validation images as a source, and how many classes their labels have."""
    source = task.images.val
    fields = {name: source.fields[name] for name in ("image", "label") if name in source.fields}
    # Sets are often sorted by class, so the first images would all show the same.
    count = min(count, source.num_records)
    chosen = np.zeros(source.num_records, bool)
    chosen[np.arange(count) * source.num_records // count] = True
    read = source.only(chosen).read
    source = dataclasses.replace(
        source.only(chosen),
        fields=fields,
        read=lambda index: {name: entry for name, entry in read(index).items() if name in fields},
    )
    return source, len(source.class_names) if "label" in fields else 0


def _measure(
    task: Task, model: ConvNeXtV2, mesh: Mesh, source: Any, classes: int, label: str
) -> tuple[int, dict[str, Layer]]:
    from cnx2_jax.data.images import eval_batches  # loads TensorFlow, so not before it is needed

    batches = watched(eval_batches(source, task.config), source.num_records, label)
    return analysis.analyse(model, task.config, sharding.put_batches(batches, mesh), classes)


def _draw(task: Task, model: ConvNeXtV2, source: Any, names: list[str], folder: str) -> dict[str, np.ndarray]:
    """Returns the first images and sheets of their activation maps, by the names of their files."""
    from cnx2_jax.data.images import eval_batches

    batch = next(iter(eval_batches(source, task.config)))
    images = batch["image"][batch["mask"]][:DRAWN]
    graph, params = split(model)
    # One device is enough for a few images, and it spares dividing them over a mesh.
    maps = analysis.activation_maps(merge(graph, jax.device_get(params)), task.config, images, names)
    drawn = task.drawable(images)
    colours = np.repeat(drawn, 3, axis=-1) if drawn.shape[-1] == 1 else drawn
    pictures = {f"{folder}/image-{index}": image for index, image in enumerate(colours)}
    for name, values in maps.items():
        for index, each in enumerate(values):
            pictures[f"{folder}/{name}.image-{index}"] = analysis_report.draw_activations(each)
    return pictures
