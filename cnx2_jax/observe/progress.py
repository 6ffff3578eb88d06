"""Lines and bars on standard error: what a command is doing, and how far it is."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

from cnx2_jax.cluster.processes import is_first

AnyBatch = TypeVar("AnyBatch", bound=Mapping)

LINE_SECONDS = 10.0  # between progress lines where standard error is no terminal


def say(text: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one; process 0 does it for all."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def watched(batches: Iterable[AnyBatch], num_images: int, what: str = "") -> Iterator[AnyBatch]:
    """Passes padded batches on, and reports how many of `num_images` are done if that takes long.

    Args:
      batches: of this process, or global ones; each has a `mask` `[B]`, False on padding.
      num_images: how many images there are.
      what: what is done with them, for the progress bar or line.
    """
    done, said = 0, time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(
        desc=what or None,
        total=num_images,
        unit="image",
        disable=not terminal,
        delay=1,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        for batch in batches:
            yield batch
            done = min(done + len(batch["mask"]), num_images)
            bar.update(done - bar.n)
            if not terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                say(
                    f"{what}: {done:,} of {num_images:,} images"
                    if what
                    else f"{done:,} of {num_images:,} images"
                )
