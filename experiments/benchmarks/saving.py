"""The cost of a checkpoint: the extra time of train steps during which one is saved.

  python -m experiments.benchmarks.saving                   # ConvNeXt V2 tiny: about five minutes on 2 cores
  python -m experiments.benchmarks.saving --variant atto --rounds 3 --steps 5 --image-size 64   # a quick look

Trains as `cnx2 train` does, on random images, in turns of --steps steps. Half of the turns save a checkpoint
(parameters and both moments of AdamW) at their beginning and end when all of it has been written in the
background. The difference between the medians of both kinds of turn is the cost of a checkpoint, also given
as a share of --every steps. The benchmark does not wait for the disk's own cache and deletes no old
checkpoint. Writes saving.json into the folder --out and prints a table.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cnx2_jax.checkpoints.manager import Checkpoints
from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.configuration import load_config
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import make_task
from cnx2_jax.train import sharding, starting
from cnx2_jax.train.program import make_program
from cnx2_jax.train.state import saved_items


def main(argv: list[str] | None = None) -> int:
    return run(lambda: _main(argv), "saving")


def _main(argv: list[str] | None) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.saving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", default="tiny", help="of the FCMAE to train; %(default)s by default")
    parser.add_argument("--batch", type=count, default=16, help="images per step; %(default)s by default")
    parser.add_argument("--image-size", type=count, default=224, help="pixels; %(default)s by default")
    parser.add_argument("--steps", type=count, default=10, help="steps per turn; %(default)s by default")
    parser.add_argument("--rounds", type=count, default=9, help="turns of each kind; %(default)s by default")
    parser.add_argument(
        "--every", type=count, default=100, help="steps per checkpoint; %(default)s by default"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark_saving"), help="folder; %(default)s by default"
    )
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="saving-", dir=args.out) as folder:
        found = measure(args, Path(folder))
    (args.out / "saving.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Returns the arguments, the seconds of every turn, and the costs that follow from their medians."""
    turn, size = _prepare(args, folder)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for i in range(args.rounds):
        for saves in (False, True) if i % 2 == 0 else (True, False):
            seconds[saves].append(turn(saves))
            what = "with" if saves else "without"
            print(f"{args.steps} steps {what} a checkpoint: {seconds[saves][-1]:.2f} s", file=sys.stderr)
    step = statistics.median(seconds[False]) / args.steps
    cost = statistics.median(seconds[True]) - statistics.median(seconds[False])
    return {
        "arguments": vars(args) | {"out": str(args.out)},
        "cores": os.cpu_count(),
        "checkpoint_bytes": size,
        "seconds_without": seconds[False],
        "seconds_with": seconds[True],
        "step_seconds": step,
        "checkpoint_seconds": cost,
        "share": cost / (args.every * step),
    }


def _prepare(args: argparse.Namespace, folder: Path) -> tuple[Callable[[bool], float], int]:
    """Returns a function that trains for a turn and returns its seconds, and the bytes of a checkpoint."""
    overrides = {
        "data.source": f"synthetic:{args.batch}:1",
        "data.root": "",
        "batch_size": args.batch,
        "image_size": args.image_size,
    }
    config = load_config(
        f"pretrain:{args.variant}",
        [f"--config.{key}={value}" for key, value in overrides.items()],
    )
    task = make_task(config)
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(task, mesh)

    def manager(name: str) -> Checkpoints:
        (folder / name).mkdir()
        return Checkpoints(folder / name, keep=1, best=task.best)

    none = manager("none")
    state = starting.first_state(task, program.transform, none, program.like, mesh)
    none.close()
    batch = next(sharding.put_batches(task.data.train_batches(0), mesh))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(saved_items(state)))
    state, metrics = program.step(state, batch)
    jax.block_until_ready(metrics)
    turns = 0

    def turn(saves: bool) -> float:
        nonlocal state, turns
        turns += 1
        checkpoints = manager(str(turns)) if saves else None
        begin = time.monotonic()
        if checkpoints:
            checkpoints.save(int(state.step), saved_items(state), task.metadata(), None)
        for _ in range(args.steps):
            state, metrics = program.step(state, batch)
            # The training loop reads the loss of each update too, so that it does not run far ahead.
            assert np.isfinite(float(metrics["loss"]))
        if checkpoints:
            checkpoints.close()
        seconds = time.monotonic() - begin
        if saves:
            shutil.rmtree(folder / str(turns))
        return seconds

    return turn, size


def table(found: dict) -> str:
    """Returns the result of `measure` as a table in Markdown."""
    args = found["arguments"]
    what = f"{args['variant']}, batch {args['batch']}, {args['image_size']} px, {found['cores']} cores"
    rows = {
        "checkpoint": f"{found['checkpoint_bytes'] / 1e6:.0f} MB",
        "one costs": f"{found['checkpoint_seconds'] / found['step_seconds']:.2f} steps",
        f"every {args['every']} steps": f"{found['share']:.2%} of their time",
    }
    return markdown_table([what, f"medians of {args['rounds']} turns"], list(rows.items()))


if __name__ == "__main__":
    sys.exit(main())
