"""Kills processes of a run again and again, and checks that its result does not change.

  python -m experiments.chaos --kills 25

Trains a very small network on scikit-learn's digits twice: undisturbed, and with processes killed (SIGKILL)
at random moments and the same command restarted once all of them have ended. Then compares parameters,
optimizer state, averages and metrics.jsonl bit for bit. Prints every kill, the verdict and one JSON line. The
exit status is 1 if anything differs, or if the processes that were not killed did not end by themselves.
"""

import argparse
import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.launch.local import free_port
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.observe.timing import TIMED

HEARTBEAT_SECONDS = 10
START_SECONDS = 15  # about the time that a start takes
PATIENCE_SECONDS = 60  # for the others to end after one was killed
EVAL_STEPS, CHECKPOINT_STEPS = 20, 4
IMAGES, BATCH = 1438, 16
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,8,8,16)",
    "--config.image_size=16",
    f"--config.batch_size={BATCH}",
    "--config.log_steps=1",
    f"--config.checkpoint_steps={CHECKPOINT_STEPS}",
    f"--config.eval_epochs={EVAL_STEPS * BATCH / IMAGES}",
    "--config.ema_decay=0.9",
]


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: when, which processes, the state of the run, and how the other processes ended."""

    second: float
    processes: list[int]
    step: int
    doing: str
    others_seconds: float
    others_status: int
    others_last_line: str


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _main(argv), "chaos")


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m experiments.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=count, default=25, help="%(default)s by default")
    parser.add_argument("--processes", type=count, default=2, help="of the run; %(default)s by default")
    parser.add_argument("--steps", type=count, default=120, help="of the run; %(default)s by default")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and processes; %(default)s by default"
    )
    parser.add_argument("--config", default="finetune:digits", help="the recipe to train")
    parser.add_argument("--out", type=Path, help="a new folder; runs/chaos-DATE-TIME by default")
    args = parser.parse_args(argv)
    out = args.out or Path("runs") / time.strftime("chaos-%Y%m%d-%H%M%S")
    out.mkdir(parents=True)

    undisturbed = Run(args, out / "undisturbed")
    undisturbed.start()
    if any(undisturbed.wait(None)):
        print(f"the undisturbed run failed; see {out}/undisturbed.*.log", file=sys.stderr)
        return 1
    killed = Run(args, out / "killed")
    kills = chaos(killed, args.kills, args.steps, random.Random(args.seed))
    differences = compare(out / "undisturbed", out / "killed", args.steps)
    print(table(kills), end="\n\n")
    for difference in differences:
        print(f"DIFFERENT: {difference}")
    if not differences:
        print(
            f"After {len(kills)} kills of {args.processes} processes the run equals the undisturbed one in "
            "every bit of parameters, optimizer state, averages and metrics."
        )
    print(json.dumps({"kills": len(kills), "different": len(differences), "out": str(out)}))
    return 1 if differences else 0


class Run:
    """A run in a workdir, which can be started again and again."""

    def __init__(self, args: argparse.Namespace, workdir: Path):
        self.workdir = workdir
        self._args = args
        self._logs: list[Path] = []
        self.processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Starts all processes of the run."""
        port = free_port()
        # What one start has compiled, the next ones need not compile again.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.workdir.parent.absolute() / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment = {**cache, **os.environ, "JAX_PLATFORMS": "cpu"}
        self.processes, self._logs = [], []
        for index in range(self._args.processes):
            command = [sys.executable, "-m", "cnx2_jax.cli", "train", "--config", self._args.config]
            command += ["--workdir", str(self.workdir), "--coordinator", f"127.0.0.1:{port}"]
            command += ["--num-processes", str(self._args.processes), "--process-id", str(index)]
            command += ["--heartbeat-seconds", str(HEARTBEAT_SECONDS)]
            command += [*SMALL, f"--config.total_steps={self._args.steps}"]
            log = self.workdir.parent / f"{self.workdir.name}.{index}.log"
            with log.open("a") as file:
                print(f"$ {shlex.join(command)}", file=file, flush=True)
                process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            self.processes.append(process)
            self._logs.append(log)

    def wait(self, seconds: float | None) -> list[int]:
        """Waits for all processes to end and returns their exit statuses.

        Raises:
          subprocess.TimeoutExpired: a process did not end in time.
        """
        return [process.wait(seconds) for process in self.processes]

    def rows(self) -> list[dict]:
        return read_rows(self.workdir)

    def step(self) -> int:
        """Returns the last logged step."""
        return max((row["step"] for row in self.rows()), default=0)

    def doing(self, trains: bool) -> str:
        """Returns what the run is probably doing, judged by its files."""
        if not trains:
            return "starting"
        if any(self.workdir.glob("checkpoints/*tmp*")):
            return "saving"
        rows = self.rows()
        if rows and rows[-1]["step"] % EVAL_STEPS == 0 and rows[-1]["split"] == "train":
            return "evaluating"
        return "training"

    def last_line(self, index: int) -> str:
        """Returns the last line of a process's output that comes from `cnx2` itself."""
        lines = self._logs[index].read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.startswith("cnx2: ")), "no line")


def chaos(run: Run, number: int, steps: int, draws: random.Random) -> list[Kill]:
    """Runs to the end with `number` kills, reports each on standard error, and returns them."""
    kills: list[Kill] = []
    while True:
        run.start()
        begun, before = time.monotonic(), run.step()
        if len(kills) == number:
            run.wait(None)
            return kills
        # Half of the kills hit the start, the others leave enough steps for those that follow.
        early = draws.random() < 0.5
        pause = draws.uniform(0, START_SECONDS) if early else draws.uniform(0, 0.5)
        target = before + draws.uniform(0, 1.6 * (steps - before) / (number - len(kills) + 1))
        rows = len(run.rows())
        while not early and (run.step() < target or len(run.rows()) == rows):
            if run.processes[0].poll() is not None:
                raise SystemExit(f"the run ended by itself: {run.last_line(0)}")
            time.sleep(0.005)
        time.sleep(pause)
        trains = len(run.rows()) != rows
        # Before all processes have met, the others would wait for minutes, so we kill all as a launcher does.
        victims = [draws.randrange(len(run.processes))] if trains else list(range(len(run.processes)))
        doing, step, second = run.doing(trains), run.step(), time.monotonic() - begun
        for victim in victims:
            run.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        statuses = run.wait(PATIENCE_SECONDS)
        other = (victims[-1] + 1) % len(statuses)
        kill = Kill(
            second, victims, step, doing, time.monotonic() - killed, statuses[other], run.last_line(other)
        )
        kills.append(kill)
        print(f"kill {len(kills)} of {number}, {doing}: {kill.others_last_line}", file=sys.stderr, flush=True)


def table(kills: list[Kill]) -> str:
    """Returns the kills as a table in Markdown."""
    rows = [
        [
            number,
            f"{kill.second:.1f}",
            " and ".join(map(str, kill.processes)),
            kill.step,
            kill.doing,
            f"{kill.others_seconds:.1f} s",
            kill.others_status,
        ]
        for number, kill in enumerate(kills, 1)
    ]
    header = ["kill", "second of this start", "process", "step", "doing", "the others ended after", "status"]
    return markdown_table(header, rows)


def compare(undisturbed: Path, killed: Path, step: int) -> list[str]:
    """Returns the names of the arrays and files that differ between two runs after `step` steps."""
    names = ("params", "opt_state", "ema")
    differences = []
    ours, theirs = (read_arrays(path / "checkpoints" / str(step), names) for path in (killed, undisturbed))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes():
            differences.append(name)
    if read_rows(killed) != read_rows(undisturbed):
        differences.append("metrics.jsonl")
    return differences


def read_arrays(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays of these items of a checkpoint by path."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for name in names:
            item = (folder / name).absolute()
            # The devices that saved it do not exist here, so Orbax needs a sharding for each array.
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                checkpointer.metadata(item).item_metadata.tree,
            )
            tree = checkpointer.restore(item, like)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def read_rows(workdir: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl without the metrics that depend on time."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not TIMED.fullmatch(name)} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
