"""Lines and bars on standard error: what a command is doing, and how far it is."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from tqdm import tqdm

from cnx2_jax.cluster.processes import is_first

LINE_SECONDS = 10.0  # between progress lines where standard error is no terminal


def say(text: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one; process 0 does it for all."""
    if is_first():
        tqdm.write(text, file=sys.stderr)


def watched(
    batches: Iterable[Mapping[str, np.ndarray]], num_images: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Passes one host's padded batches on, telling how many of `num_images` are done if that takes long."""
    done, said = 0, time.monotonic()
    terminal = sys.stderr.isatty()
    with tqdm(
        total=num_images, unit="image", disable=not terminal, delay=1, leave=False, dynamic_ncols=True
    ) as bar:
        for batch in batches:
            yield batch
            done = min(done + len(batch["mask"]), num_images)
            bar.update(done - bar.n)
            if not terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                say(f"{done:,} of {num_images:,} images")
