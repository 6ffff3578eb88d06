"""`cnx2 evaluate`."""

import argparse
import json
from pathlib import Path

from flax import nnx

from cnx2_jax.configuration import override, read_config
from cnx2_jax.tasks import base, make_task
from cnx2_jax.train import checkpoint, sharding
from cnx2_jax.train.state import merge, split

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=Path, help="the run, for its config")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a checkpoints/STEP or an exported checkpoint; the run's latest by default",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    config = override(read_config(args.workdir), overrides)
    task = make_task(config)
    folder = checkpoint.find(args.checkpoint or args.workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    graph, like = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    params = checkpoint.read_params(folder)
    base.check_params(params, like, str(folder))
    params = sharding.put_params(params, mesh)
    batches = sharding.put_batches(task.data.eval_batches(), mesh)
    metrics = task.evaluate(merge(graph, params), batches)
    print(json.dumps({"checkpoint": str(folder), **metrics}))
