"""Reports a run: progress on standard error, metrics.jsonl, pictures and TensorBoard."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cnx2_jax.errors import RunError
from cnx2_jax.files import Rows, write_text
from cnx2_jax.observe.pictures import encode
from cnx2_jax.observe.progress import LINE_SECONDS, say
from cnx2_jax.observe.tensorboard import EventWriter
from cnx2_jax.types import Metrics


class NoReport:
    """A report that does nothing, for processes other than the first."""

    def progress(self, step: int) -> None:
        """Called when `step` updates are done."""

    def log(self, step: int, split: str, metrics: Metrics) -> None:
        """Called with the metrics of a step."""

    def settle(self) -> None:
        """Called before a checkpoint is saved."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Called with a uint8 picture `[H, W, 3]`."""

    def close(self) -> None:
        """Called once, at the end."""


class Report(NoReport):
    """Reports one run into its workdir.

    `metrics.jsonl` holds one JSON object per logged step and split: `{"step": ..., "split": "train" or
    "val", ...}`. Every metric except those in `observe.timing.TIMED` depends only on the config and the step.
    Rows after the step that the run resumes from are dropped, because the run writes them again.

    Args:
      workdir: the folder for `metrics.jsonl`, `tensorboard/` and pictures.
      start_step: the step that the run resumes from, 0 for a new one.
      total_steps: the step that the run ends with.
      batch_size: images per step, to estimate the time left.

    Raises:
      RunError: from this and every method, if a file cannot be written.
    """

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int, batch_size: int):
        self._workdir = workdir
        self._batch_size = batch_size
        self._total = total_steps
        self._path = workdir / "metrics.jsonl"
        kept = [row for row in read_metrics(self._path) if row["step"] <= start_step]
        with self._writing():
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
            self._rows = Rows(self._path)
            self._board = EventWriter(workdir / "tensorboard")
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not terminal, dynamic_ncols=True
        )
        self._lines = not terminal
        self._said = time.monotonic()

    def progress(self, step: int) -> None:
        """Moves the progress bar to `step` updates done."""
        self._bar.update(step - self._bar.n)

    def log(self, step: int, split: str, metrics: Metrics) -> None:
        """Writes one row."""
        with self._writing():
            self._rows.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
            for name, value in metrics.items():
                self._board.scalar(f"{split}/{name}", value, step)
            self._board.flush()
        if split == "val":
            say(f"step {step}: {', '.join(f'val {k} {v:.4g}' for k, v in metrics.items())}")
            return
        loss = metrics.get("loss", math.nan)  # a skipped update has no loss
        rate = metrics.get("images_per_sec", 0.0)
        self._bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} images/s")
        if self._lines and (step == self._total or time.monotonic() - self._said > LINE_SECONDS):
            self._said = time.monotonic()
            left = (self._total - step) * self._batch_size / rate if rate else 0
            say(
                f"step {step}/{self._total} ({100 * step / self._total:.0f}%), loss {loss:.4g}, "
                f"{rate:.0f} images/s, {left // 60:.0f}:{left % 60:02.0f} left"
            )

    def settle(self) -> None:
        """Makes all rows durable. Called before a checkpoint is saved, so none is newer than the rows."""
        with self._writing():
            self._rows.settle()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 image `[H, W, 3]` to `NAME/STEP.png` and to TensorBoard."""
        with self._writing():
            path = self._workdir / name / f"{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            png = encode(image, path)
            path.write_bytes(png)
            height, width, _ = image.shape
            self._board.image(name, png, width, height, step)
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        with self._writing(), contextlib.closing(self._rows):  # even if the next line fails
            self._board.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"cannot write to workdir '{self._workdir}': {reason}; checkpoints saved before are "
                "complete: when it can be written to again, the same command resumes"
            ) from error


def read_metrics(path: Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl, without a last line that a killed process left incomplete."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def read_evaluations(path: Path, step: int) -> list[Metrics]:
    """Returns the evaluations up to a step from a metrics.jsonl in order: metrics with their `step`."""
    rows = [row for row in read_metrics(path) if row["split"] == "val" and row["step"] <= step]
    return [{name: value for name, value in row.items() if name != "split"} for row in rows]
