"""`cnx2 train`."""

import argparse
import json

from cnx2_jax.cluster import processes
from cnx2_jax.configuration import load_config
from cnx2_jax.files import to_path, write_text
from cnx2_jax.tasks import make_task
from cnx2_jax.train.loop import fit
from cnx2_jax.workdir import RESULT

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME:RECIPE",
        help="a recipe that comes with the package, such as pretrain:tiny, or one in a file of your own, "
        "FILE.py:RECIPE; change any key with --config.KEY=VALUE",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=to_path,
        help="the run's folder, for config.json, metrics.jsonl, checkpoints/, tensorboard/ and, at the end, "
        "result.json; if it holds a run, the same command resumes it; give all processes the same folder",
    )
    processes.add_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    with processes.joined(args):
        metrics = fit(make_task(load_config(args.config, overrides)), args.workdir)
        if metrics is not None and processes.is_first():
            line = json.dumps(metrics)
            write_text(args.workdir / RESULT, f"{line}\n")  # marks the run as finished
            print(line)
