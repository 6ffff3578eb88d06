"""Feature vectors in a file: NumPy's format, with the names of the rows beside it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new

Write = Callable[[Float32[np.ndarray, "n dim"]], None]


def check(path: Path) -> None:
    """Raises UserError if no feature file can be made there, before the work of which it is to tell.

    It does not end in `.npy`, or see `base.check_new`, for the list of names too.
    """
    if path.suffix != ".npy":
        raise UserError(f"--features '{path}' must end in .npy")
    for one in (path, names_path(path)):
        check_new(one, "--features")


def names_path(path: Path) -> Path:
    """Returns where the names of the rows go: `out.json` beside `out.npy`."""
    return path.with_suffix(".json")


@contextlib.contextmanager
def writer(path: Path, names: Sequence[str], dim: int) -> Iterator[Write]:
    """Opens a feature file: a context that gives a function to write the next rows with.

    Vectors are not kept in memory. Both files are there once the context is left, whole; leaving it by an
    error leaves neither.

    Args:
      path: of the vectors, float32 `[rows, dim]`; see `check`.
      names: of all rows that will be written; they become a JSON list.
      dim: of a vector.

    Raises:
      UserError: a file cannot be written.
    """
    partials = {
        whole: whole.with_name(f"{whole.name}.partial-{os.getpid()}") for whole in (names_path(path), path)
    }
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for partial in partials.values():
            stack.callback(partial.unlink, missing_ok=True)
        with _said(path):
            partials[names_path(path)].write_text(json.dumps(list(names)))
            # Unbuffered, so that nothing is left to fail when the file is closed.
            file = stack.enter_context(partials[path].open("wb", buffering=0))
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)}
            np.lib.format.write_array_header_1_0(file, header)

        def write(vectors: Float32[np.ndarray, "n dim"]) -> None:
            rest = memoryview(vectors.astype("<f4").tobytes())
            with _said(path):
                while rest:
                    rest = rest[file.write(rest) :]

        yield write
        with _said(path):
            for whole, partial in partials.items():
                os.replace(partial, whole)


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
