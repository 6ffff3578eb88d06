"""The input pipeline: speed against Pillow in a PyTorch DataLoader, memory over time, and start-up time.

  python -m experiments.benchmarks.data                  # everything: about half an hour on 2 cores
  python -m experiments.benchmarks.data speed start      # some sections
  python -m experiments.benchmarks.data speed --rounds 3 --batches 2    # a quick look

Sections:
  speed    images/s from 500x375 JPEGs in memory to 224 pixels, on one core and on all: decoding, random
           resized crop and mirroring; then the same with the fine-tuning recipe's RandAugment and random
           erasing. In turns with the peers, which need the extra `parity`
  memory   resident memory over thousands of batches of 256, with the recipe
  start    time to the first batch at step 1,000,000 of an ImageNet-sized set, relative to that at step 0

Each section writes SECTION.json and a table SECTION.md into the folder --out.
"""

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.errors import RunError, UserError, nearest
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import defaults

HEIGHT, WIDTH = 375, 500
PHOTOGRAPHS = 64
RECIPE = {"augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
KINDS = ("crop", "recipe")
CONTESTANTS = ("cnx2", "official", "uint8")  # the last two are the peers of pil_peer.py
FAR_STEP = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "data")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark_data"), help="folder; %(default)s by default"
    )
    parser.add_argument("--rounds", type=count, default=9, help="speed, start: turns; %(default)s by default")
    parser.add_argument(
        "--batches",
        type=count,
        default=16,
        help="speed: batches of 64 images per turn; %(default)s by default",
    )
    parser.add_argument(
        "--warm-up",
        type=count,
        default=200,
        help="memory: batches before the first measurement; %(default)s by default",
    )
    parser.add_argument(
        "--measured", type=count, default=2000, help="memory: batches after it; %(default)s by default"
    )
    parser.add_argument("--image-size", type=count, default=224, help="pixels; %(default)s by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # run one contestant; used by `speed`
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            raise UserError(
                f"unknown section '{section}'{nearest(section, SECTIONS)} (known: {', '.join(SECTIONS)})"
            )
    return args


def _run(args: argparse.Namespace) -> None:
    if args.worker:
        return _work(args)
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.sections or SECTIONS:
        begin = time.monotonic()
        records, table = SECTIONS[section](args)
        print(f"{section}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        content = {
            "cores": len(_cores()),
            "arguments": vars(args) | {"out": str(args.out)},
            "records": records,
        }
        (args.out / f"{section}.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.out / f"{section}.md").write_text(table + "\n")
        print(table)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _config(source: str, root: Path | None, batch: int, size: int, recipe: bool):
    config = defaults("classify")
    config.batch_size = batch
    config.image_size = (size, size)
    config.data.source = source
    config.data.root = str(root or "")
    config.data.val_fraction = 0.0
    if recipe:
        config.data.update(RECIPE)
    return config


def _photographs() -> list[bytes]:
    """Returns parts of scikit-learn's two photographs as JPEGs of the most common size in ImageNet."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    contents = []
    for index in range(PHOTOGRAPHS):
        photograph = Image.fromarray(load_sample_images().images[index % 2])
        width = int(rng.integers(400, 560))
        height = width * HEIGHT // WIDTH
        left = int(rng.integers(0, photograph.width - width + 1))
        top = int(rng.integers(0, photograph.height - height + 1))
        part = photograph.crop((left, top, left + width, top + height))
        buffer = io.BytesIO()
        part.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        contents.append(buffer.getvalue())
    return contents


def _stream(contestant: str, kind: str, args: argparse.Namespace, root: Path, cores: int) -> Iterator:
    recipe = kind == "recipe"
    if contestant == "cnx2":
        from cnx2_jax.data.images import ImageData

        return ImageData(_config("folder", root, 64, args.image_size, recipe)).train_batches(0)
    import torch

    from experiments.benchmarks.pil_peer import loader

    torch.set_num_threads(1)
    contents = [path.read_bytes() for path in sorted(root.glob("*/*.jpg"))]
    # On one core we load in the process itself, because a worker would only add copies.
    workers, normalised = cores if cores > 1 else 0, contestant == "official"
    return iter(loader(contents, args.image_size, 64, recipe=recipe, normalised=normalised, workers=workers))


def _work(args: argparse.Namespace) -> None:
    """Runs a contestant: for each line on standard input, makes batches and prints their images/s."""
    contestant, kind, root = args.worker.split(",", 2)
    stream = _stream(contestant, kind, args, Path(root), len(_cores()))
    for _ in range(3):
        next(stream)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(args.batches):
            next(stream)
        print(64 * args.batches / (time.perf_counter() - start), flush=True)


class _Contestant:
    """A contestant in processes of its own on some of the cores, suspended between its turns.

    Contestants prefetch; without suspension they would do so during the turns of the others.
    """

    def __init__(self, name: str, args: argparse.Namespace, root: Path, cores: list[int]):
        command = [sys.executable, "-m", "experiments.benchmarks.data", "--worker", f"{name},{root}"]
        command += ["--batches", str(args.batches), "--image-size", str(args.image_size)]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            process_group=0,
        )
        self._name = name
        self._answer()
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"'{self._name}' ended early; is the extra `parity` installed?")
        return line

    def turn(self) -> float:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        rate = float(self._answer())
        self._signal(signal.SIGSTOP)
        return rate

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


def _speed(args: argparse.Namespace) -> tuple[list[dict], str]:
    root = args.out.absolute() / "photographs"
    for index, content in enumerate(_photographs()):
        path = root / ("china", "flower")[index % 2] / f"{index:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    records: list[dict] = []
    rows = []
    for kind in KINDS:
        for cores in dict.fromkeys(((_cores()[-1],), tuple(_cores()))):
            contestants = [_Contestant(f"{name},{kind}", args, root, list(cores)) for name in CONTESTANTS]
            try:
                turns = [[contestant.turn() for contestant in contestants] for _ in range(args.rounds)]
            finally:
                for contestant in contestants:
                    contestant.end()
            ratios = [
                statistics.median(turn[0] / turn[place] for turn in turns)
                for place in range(1, len(CONTESTANTS))
            ]
            records.append({"kind": kind, "cores": len(cores), "ratios": ratios, "turns": turns})
            rows.append([kind, len(cores), *(f"{ratio:.2f}x" for ratio in ratios)])
    return records, markdown_table(["", "cores", "over the official way", "over timm's uint8"], rows)


def _memory(args: argparse.Namespace) -> tuple[list[dict], str]:
    from cnx2_jax.data.images import ImageData

    stream = ImageData(_config("synthetic", None, 256, args.image_size, True)).train_batches(0)
    every = max(1, args.measured // 20)
    records = []
    for step in range(1, args.warm_up + args.measured + 1):
        next(stream)
        if step >= args.warm_up and (step - args.warm_up) % every == 0:
            records.append({"batches": step, "mib": _resident_mib()})
    first, last = records[0], records[-1]
    peak = max(record["mib"] for record in records)
    measured = [(f"{one['batches']:,}", one["mib"]) for one in (first, records[len(records) // 2], last)]
    rows = [
        [batches, f"{mib:.0f} MiB", f"{mib / first['mib'] - 1:+.1%}"]
        for batches, mib in [*measured, ("most", peak)]
    ]
    return records, markdown_table(["after batches", "resident", "growth"], rows)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _start(args: argparse.Namespace) -> tuple[list[dict], str]:
    from cnx2_jax.data.images import ImageData

    images = ImageData(_config("synthetic", None, 64, args.image_size, False))

    def first_batch(step: int) -> float:
        begin = time.perf_counter()
        next(images.train_batches(step))
        return time.perf_counter() - begin

    first_batch(0)
    turns = [[first_batch(step) for step in (FAR_STEP, 0)] for _ in range(args.rounds)]
    ratio = statistics.median(far / near for far, near in turns)
    table = markdown_table(["", "ratio"], [[f"first batch at step {FAR_STEP:,} over step 0", f"{ratio:.2f}"]])
    return [{"ratio": ratio, "turns": turns}], table


SECTIONS: dict[str, Callable] = {"speed": _speed, "memory": _memory, "start": _start}


if __name__ == "__main__":
    sys.exit(main())
