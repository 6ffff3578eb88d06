"""Reading TIFFs of 12 bands, 16 bits and 120x120 pixels: the pipeline against a Python loop of tifffile.

  python -m experiments.benchmarks.arrays
  python -m experiments.benchmarks.arrays --rounds 3 --files 200    # a quick look

Both run on one core, in turns, and give batches of 64: the pipeline whole, with its order, and a loop
of `tifffile.imread` and `numpy.stack`. The table has the median of the ratios of the turns.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.observe.tables import markdown_table
from cnx2_jax.tasks import defaults

SIDE, BANDS, BATCH = 120, 12, 64


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _run(_parse(argv)), "arrays")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.benchmarks.arrays",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=count, default=500, help="to read from; %(default)s by default")
    parser.add_argument("--rounds", type=count, default=9, help="turns; %(default)s by default")
    parser.add_argument("--batches", type=count, default=20, help="per turn; %(default)s by default")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> None:
    import tifffile

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before TensorFlow counts the cores
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for index in range(args.files):
            image = rng.integers(0, 10_000, (SIDE, SIDE, BANDS)).astype(np.uint16)
            path = Path(folder) / f"{index:05}.tif"
            tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig")
        loader, stream = _python(folder), _pipeline(folder)
        turns = [[_rate(each, args.batches) for each in (stream, loader)] for _ in range(args.rounds)]
    rates = [statistics.median(column) for column in zip(*turns, strict=True)]
    ratio = statistics.median(ours / theirs for ours, theirs in turns)
    rows = [["pipeline", f"{rates[0]:,.0f}", f"{ratio:.2f}x"], ["tifffile", f"{rates[1]:,.0f}", "1x"]]
    print(markdown_table(["one core", "images/s", "ratio"], rows))


def _rate(batches: Iterator[np.ndarray], number: int) -> float:
    """Returns images per second of processor time, which other processes on the machine do not change."""
    for _ in range(3):  # what was prefetched during the other's turn
        next(batches)
    start = time.process_time()
    for _ in range(number):
        next(batches)
    return number * BATCH / (time.process_time() - start)


def _python(folder: str) -> Iterator[np.ndarray]:
    import tifffile

    paths = sorted(Path(folder).iterdir())
    rng = np.random.default_rng(0)
    read: Callable[[int], np.ndarray] = lambda place: tifffile.imread(paths[place])  # noqa: E731
    while True:
        yield np.stack([read(place) for place in rng.integers(0, len(paths), BATCH)])


def _pipeline(folder: str) -> Iterator[np.ndarray]:
    from cnx2_jax.data import pipeline
    from cnx2_jax.data.fields import example_arrays
    from cnx2_jax.data.sources import open_source

    config = defaults("pretrain")
    config.model.in_chans = BANDS
    config.data.update({"source": "arrays", "root": folder, "val_fraction": 0.0, "dtype": "uint16"})
    config.data.update({"mean": (5000.0,) * BANDS, "std": (2900.0,) * BANDS})
    source = open_source(config.data, "train", 0)
    field = source.fields["image"].configured(config)

    class Read:
        """Decodes and changes nothing."""

        def decode(self, record, seed):
            return {"image": field.decode(record["image"])}

        def finish(self, values, seed):
            image = {"image": values["image"]}
            return example_arrays({"image": field}, image)

    examples = pipeline.Examples(
        source, source, Read(), Read(), 0, BATCH, pipeline.faults.Tolerance("error", 0.0)
    )
    return (batch["image"] for batch in examples.train_batches(0))


if __name__ == "__main__":
    sys.exit(main())
