"""`cnx2 train`."""

import argparse
import json
import os
from pathlib import Path

import jax

from cnx2_jax.configuration import load_config
from cnx2_jax.tasks import make_task
from cnx2_jax.train.loop import fit

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE:RECIPE",
        help="a file of configs/ and a recipe in it, such as configs/pretrain.py:digits; change any key "
        "of it with --config.KEY=VALUE",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=Path,
        help="where config.json, metrics.jsonl, checkpoints/, tensorboard/ and, at the end, result.json go; "
        "the same command goes on with the run it finds there",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    metrics = fit(make_task(load_config(args.config, overrides)), args.workdir)
    if metrics is None:
        return
    line = json.dumps(metrics)
    if jax.process_index() == 0:
        partial = args.workdir / "result.tmp"
        partial.write_text(f"{line}\n")
        os.replace(partial, args.workdir / "result.json")  # by which others see that the run is at its end
    print(line)
