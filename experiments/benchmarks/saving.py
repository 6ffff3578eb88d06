"""What saving costs a run: the time of train steps with a checkpoint among them, over that without.

  python experiments/benchmark_saving.py                    # ConvNeXt V2 tiny: about five minutes on 2 cores
  python experiments/benchmark_saving.py --variant atto --rounds 3 --steps 5 --image-size 64    # a quick look

Trains as `cnx2 train` does, on random images, in turns of so many steps that save once at their beginning or
not at all. What a turn that saves takes longer, to the end of all writing in the background, is what a
checkpoint costs; spread over --every steps it is told as a share of them. Parameters and both moments of
AdamW are saved. What the disk does after Orbax has handed it all over is not waited for, and no old one is
deleted. Writes saving.json into the folder --out, and prints a table.
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

from cnx2_jax.checkpoints.checkpoint import saved_items
from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.configuration import load_config
from cnx2_jax.tasks import make_task
from cnx2_jax.train import sharding, starting
from cnx2_jax.train.program import make_program

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    return run(lambda: _main(argv), "benchmark_saving")


def _main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", help="of the FCMAE that is trained; %(default)s")
    parser.add_argument("--batch", type=count, default=16, help="images per step; %(default)s")
    parser.add_argument("--image-size", type=count, default=224, help="pixels; %(default)s")
    parser.add_argument("--steps", type=count, default=10, help="in a turn; %(default)s")
    parser.add_argument("--rounds", type=count, default=9, help="turns of each kind; %(default)s")
    parser.add_argument("--every", type=count, default=100, help="steps per checkpoint; %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_saving"), help="folder; %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="saving-", dir=args.out) as folder:
        found = measure(args, Path(folder))
    (args.out / "saving.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Returns the arguments, seconds of every turn, and what follows from their medians; see `table`."""
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
    """Returns a function that trains for a turn and says how long it took, and the bytes of a checkpoint."""
    overrides = {
        "data.source": f"synthetic:{args.batch}:1",
        "data.root": "",
        "batch_size": args.batch,
        "image_size": args.image_size,
    }
    config = load_config(
        f"{ROOT}/configs/pretrain.py:{args.variant}",
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
            checkpoints.save(int(state.step), state, task.metadata(), None)
        for _ in range(args.steps):
            state, metrics = program.step(state, batch)
            # As the loop, which looks at each update before it goes far ahead of it.
            assert np.isfinite(float(metrics["loss"]))
        if checkpoints:
            checkpoints.close()
        seconds = time.monotonic() - begin
        if saves:
            shutil.rmtree(folder / str(turns))
        return seconds

    return turn, size


def table(found: dict) -> str:
    """Returns the findings for people, as Markdown."""
    args = found["arguments"]
    what = f"{args['variant']}, batch {args['batch']}, {args['image_size']} px, {found['cores']} cores"
    rows = {
        "checkpoint": f"{found['checkpoint_bytes'] / 1e6:.0f} MB",
        "one costs": f"{found['checkpoint_seconds'] / found['step_seconds']:.2f} steps",
        f"every {args['every']} steps": f"{found['share']:.2%} of their time",
    }
    lines = [(what, f"medians of {args['rounds']} turns"), ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


if __name__ == "__main__":
    sys.exit(main())
