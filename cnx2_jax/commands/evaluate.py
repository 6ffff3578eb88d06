"""`cnx2 evaluate`."""

import argparse
import json
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cluster import processes
from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import metrics, neighbours, report, robustness
from cnx2_jax.files import check_new, to_path
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.progress import say, watched
from cnx2_jax.tasks import Task, make_task, models, weights
from cnx2_jax.tasks.base import TTA, TTA_HELP, use_tta
from cnx2_jax.train import sharding
from cnx2_jax.train.task import AVERAGED
from cnx2_jax.types import Metrics
from cnx2_jax.workdir import read_config

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=to_path, help="the run; its config gives the images")
    parser.add_argument(
        "--checkpoint",
        type=to_path,
        help="a checkpoints/STEP or an exported checkpoint; by default that of the run's result, or its "
        "latest",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="evaluate on another of ImageNet's validation sets instead: "
        f"{', '.join(robustness.SETS)}; FOLDER holds the set as published, or is tfds[:DATA_DIR]; give "
        "the option once per set",
    )
    parser.add_argument(
        "--knn",
        type=int,
        metavar="K",
        help="classify validation images by their K nearest training images instead; 20 is usual. Works for "
        "pretraining runs too, if the images have classes",
    )
    parser.add_argument(
        "--report",
        type=to_path,
        metavar="FOLDER",
        help="write tables and plots into a new folder: of every class; for classification also of "
        "calibration, confusions and the worst mistakes; for regression of the errors. Where a run has "
        "averaged weights, they are of these",
    )
    parser.add_argument("--tta", choices=TTA, help=TTA_HELP)
    parser.add_argument(
        "--out",
        type=to_path,
        metavar="FOLDER",
        help="write the results for each image into a new folder; for detection: results_bbox.json and "
        "results_segm.json, in COCO's format",
    )
    processes.add_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    if not args.set and args.workdir is None:
        raise UserError("evaluate needs --workdir, or --set NAME=FOLDER with --checkpoint")
    if args.set and args.knn is not None:
        raise UserError("--knn uses the run's own images and excludes --set; give only one of the two")
    files = {"--report": args.report, "--out": args.out}
    for option, value in {**files, "--tta": args.tta}.items():
        if value is not None and (args.set or args.knn is not None):
            raise UserError(
                f"{option} is about the run's own images and excludes --set and --knn; leave it out"
            )
        if value is not None and option in files:
            check_new(value, option)
    with processes.joined(args):
        if args.set:
            results = _on_sets(args, overrides)
        elif args.knn is not None:
            results = _by_neighbours(args, overrides)
        else:
            results = _on_run_images(args, overrides)
        if processes.is_first():
            print(json.dumps(results))


def _on_run_images(args: argparse.Namespace, overrides: list[str]) -> dict:
    task, model, mesh, folder = _run_of(args, overrides, averaged=False)
    if args.report is not None and not task.gives_report:
        raise UserError(f"--report: task '{task.config.task}' has nothing to report; leave it out")
    if args.out is not None and not task.writes_results:
        raise UserError(f"--out: task '{task.config.task}' writes nothing for each image; leave it out")
    results: dict = {"checkpoint": str(folder)}
    files = args.report, args.out
    has_average = checkpoint.has_average(folder)
    results |= _metrics(task, model, mesh, "evaluating", *((None, None) if has_average else files))
    if has_average:
        graph, _ = split(model)
        model = merge(graph, sharding.put_params(checkpoint.read_params(folder), mesh))
        averaged = _metrics(task, model, mesh, "evaluating the averaged weights", *files)
        results |= {AVERAGED + name: value for name, value in averaged.items()}
    return results


def _metrics(
    task: Task, model, mesh: Mesh, label: str, report_folder: Path | None, out: Path | None
) -> Metrics:
    batches = sharding.put_batches(task.images.eval_batches(**processes.share()), mesh, keep_host=True)
    batches = watched(batches, task.images.num_val, label)
    if report_folder is None and out is None:
        return task.evaluate(model, batches)
    collected = metrics.collect(task.reporter() if report_folder else task, model, batches)
    if report_folder is not None and processes.is_first():
        for line in report.write_report(report_folder, task.report(collected)):
            say(line)
    if out is not None and processes.is_first():
        task.write_results(collected, out)
        say(f"wrote the results for each image to {out}")
    return collected.results()


def _by_neighbours(args: argparse.Namespace, overrides: list[str]) -> dict:
    if jax.process_count() > 1:
        raise UserError(f"--knn works in one process, not in {jax.process_count()}; start a single process")
    task, model, mesh, folder = _run_of(args, overrides)
    if not task.gives_features:
        raise UserError(f"--knn: task '{task.config.task}' gives no label to an image; leave it out")
    if task.wanted != "label":
        raise UserError(f"--knn: images have no single class in task '{task.config.task}'; leave it out")
    found = neighbours.evaluate(models.without_decoder(model), task.config, task.images, args.knn, mesh)
    return {"checkpoint": str(folder), **found}


def _run_of(args: argparse.Namespace, overrides: list[str], *, averaged: bool = True):
    """Returns the task of a run, its model on the mesh, the mesh, and the folder of the checkpoint."""
    config = override(read_config(args.workdir), overrides)
    use_tta(config, args.tta)
    task = make_task(config)
    folder = checkpoint.find(args.checkpoint or args.workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    metadata = checkpoint.read_metadata(folder)
    weights.check_class_names(metadata, task.metadata(), str(folder))
    task.adopt(metadata)
    graph, like = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    params = checkpoint.read_params(folder, averaged=averaged)
    weights.check_params(params, like, str(folder))
    return task, merge(graph, sharding.put_params(params, mesh)), mesh, folder


def _on_sets(args: argparse.Namespace, overrides: list[str]) -> dict:
    places: dict[str, str] = {}
    for choice in args.set:
        name, _, location = choice.partition("=")
        robustness.check(name)
        if name in places:
            raise UserError(f"--set {name} is given twice; evaluate one folder at a time")
        places[name] = location
        if not location:
            raise UserError(f"--set {name} needs a folder: --set {name}=FOLDER")
    path = args.checkpoint or args.workdir
    if path is None:
        raise UserError("--set needs a model; give --checkpoint or --workdir")
    model, config, class_names = weights.load(path)
    if not isinstance(model, ConvNeXtV2) or not class_names:
        kind = f"is of task '{config.task}'" if class_names else "has no classes (pretraining has none)"
        raise UserError(f"checkpoint '{path}' {kind}, and --set needs a classifier; fine-tune it first")
    config = override(config, overrides)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    graph, params = split(model)
    model = merge(graph, sharding.put_params(params, mesh))
    results: dict = {"checkpoint": str(checkpoint.find(path))}
    for name, location in places.items():
        found = robustness.evaluate_set(model, config, class_names, name, location, mesh)
        say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
        results[name] = found
    return results
