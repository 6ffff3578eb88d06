"""Progress lines and bars on standard error."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

from cnx2_jax.cluster.processes import is_first

AnyBatch = TypeVar("AnyBatch", bound=Mapping)
Item = TypeVar("Item")

LINE_SECONDS = 10.0  # between progress lines if standard error is not a terminal


def say(text: str) -> None:
    """Prints a line to standard error, above the progress bar if one is shown. Only process 0 prints."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def watched(batches: Iterable[AnyBatch], num_images: int, label: str = "") -> Iterator[AnyBatch]:
    """Yields padded batches, and reports how many of `num_images` are done if that takes long.

    Args:
      batches: this process's batches, or global ones; each has a `mask` `[B]`, False on padding.
      num_images: number of images.
      label: the name of the work, for the progress bar or line.
    """
    return _reported(batches, num_images, label, lambda batch: len(batch["mask"]))


def counted(items: Iterable[Item], num_images: int, label: str = "") -> Iterator[Item]:
    """Yields items of one image each, and reports as `watched` does."""
    return _reported(items, num_images, label, lambda _: 1)


def _reported(
    batches: Iterable[Item], num_images: int, label: str, size: Callable[[Item], int]
) -> Iterator[Item]:
    done, printed_at = 0, time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=label or None,
        total=num_images,
        unit="image",
        disable=not terminal,
        delay=1,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        for batch in batches:
            yield batch
            done = min(done + size(batch), num_images)
            bar.update(done - bar.n)
            if not terminal and time.monotonic() - printed_at > LINE_SECONDS:
                printed_at = time.monotonic()
                say(f"{f'{label}: ' if label else ''}{done:,} of {num_images:,} images")
