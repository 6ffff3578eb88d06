"""What a run tells: progress on standard error, metrics.jsonl, TensorBoard."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from cnx2_jax.errors import RunError
from cnx2_jax.files import write_text
from cnx2_jax.observe.progress import LINE_SECONDS, say
from cnx2_jax.types import Metrics


class Silence:
    """What a process does that does not report: it knows which evaluations were done.

    Args:
      workdir: of the run.
      start_step: the step that the run resumes from, 0 for a new one.
    """

    def __init__(self, workdir: Path, *, start_step: int):
        rows = [row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] <= start_step]
        self._rows = rows
        self._evaluated = {row["step"]: row for row in rows if row["split"] == "val"}

    def evaluation(self, step: int) -> Metrics | None:
        """Returns the metrics of the evaluation at this step, if it was done."""
        row = self._evaluated.get(step)
        return {k: v for k, v in row.items() if k not in ("step", "split")} if row else None

    def progress(self, step: int) -> None:
        """Says that `step` updates are done."""

    def log(self, step: int, split: str, metrics: Metrics) -> None:
        """Takes in one row."""
        if split == "val":
            self._evaluated[step] = {"step": step, "split": split, **metrics}

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Takes in a uint8 image `[H, W, 3]`."""

    def close(self) -> None:
        """Ends the report."""


class Report(Silence):
    """Reports one run; rows after the step that it resumes from are dropped, as they come again.

    `metrics.jsonl` holds one JSON object per logged step and split: `{"step": ..., "split": "train" or
    "val", ...}`. Every metric but those of `observe.TIMED` is a function of the config and the step.

    Args:
      workdir: where `metrics.jsonl`, `tensorboard/` and `reconstructions/` go.
      start_step: the step that the run resumes from, 0 for a new one.
      total_steps: the step that it ends with.
      batch_size: images per step, for the time that is left.

    Raises:
      RunError: what it writes cannot be written.
    """

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int, batch_size: int):
        super().__init__(workdir, start_step=start_step)
        self._workdir = workdir
        self._batch_size = batch_size
        self._total = total_steps
        self._path = workdir / "metrics.jsonl"
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
        self._file = self._path.open("a")
        self._board = tf.summary.create_file_writer(str(workdir / "tensorboard"))
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
        """Writes one row; it is on disk when this returns, so a checkpoint never runs ahead of its rows."""
        with self._writing():
            self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._board.as_default():
                for name, value in metrics.items():
                    tf.summary.scalar(f"{split}/{name}", value, step=step)
        super().log(step, split, metrics)
        if split == "val":
            say(f"step {step}: {', '.join(f'val {k} {v:.4g}' for k, v in metrics.items())}")
            return
        loss = metrics.get("loss", math.nan)  # not there after an update that was skipped
        rate = metrics.get("images_per_sec", 0.0)
        self._bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} images/s")
        if self._lines and (step == self._total or time.monotonic() - self._said > LINE_SECONDS):
            self._said = time.monotonic()
            left = (self._total - step) * self._batch_size / rate if rate else 0
            say(
                f"step {step}/{self._total} ({100 * step / self._total:.0f}%), loss {loss:.4g}, "
                f"{rate:.0f} images/s, {left // 60:.0f}:{left % 60:02.0f} left"
            )

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a uint8 image `[H, W, 3]` to `NAME/STEP.png` and to TensorBoard."""
        with self._writing(), self._board.as_default():
            path = self._workdir / name / f"{step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
            tf.summary.image(name, image[None], step=step)

    def close(self) -> None:
        self._bar.close()
        with self._writing():
            self._board.close()
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RunError(
                f"cannot write to workdir '{self._workdir}': {reason}; checkpoints saved before are whole, "
                "make room and give the same command"
            ) from error


def read_metrics(path: Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl; a last line that a killed process left unfinished is dropped."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
