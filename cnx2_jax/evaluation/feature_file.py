"""Writes feature vectors to a `.npy` file, with the names of the rows in a `.json` file beside it."""

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
    """Checks a path before the expensive work starts.

    Raises:
      UserError: it does not end in `.npy`, or it or its list of names exists already or cannot be written.
    """
    if path.suffix != ".npy":
        raise UserError(f"--features '{path}' must end in .npy")
    for file in (path, names_path(path)):
        check_new(file, "--features")


def names_path(path: Path) -> Path:
    """Returns the path of the list of names: `out.json` beside `out.npy`."""
    return path.with_suffix(".json")


@contextlib.contextmanager
def writer(path: Path, names: Sequence[str], dim: int) -> Iterator[Write]:
    """Opens a feature file: a context manager that gives a function to write the next rows.

    Vectors are not kept in memory. Both files appear, complete, at the end of the block; after an error there
    is neither.

    Args:
      path: the file of the vectors, float32 `[rows, dim]`; see `check`.
      names: the names of all rows that will be written, for the JSON list.
      dim: the length of a vector.

    Raises:
      UserError: a file cannot be written.
    """
    partials = {
        whole: whole.with_name(f"{whole.name}.partial-{os.getpid()}") for whole in (names_path(path), path)
    }
    with _user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for partial in partials.values():
            stack.callback(partial.unlink, missing_ok=True)
        with _user_errors(path):
            partials[names_path(path)].write_text(json.dumps(list(names)))
            # Unbuffered: closing the file cannot fail then.
            file = stack.enter_context(partials[path].open("wb", buffering=0))
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)}
            np.lib.format.write_array_header_1_0(file, header)

        def write(vectors: Float32[np.ndarray, "n dim"]) -> None:
            rest = memoryview(vectors.astype("<f4").tobytes())
            with _user_errors(path):
                while rest:
                    rest = rest[file.write(rest) :]

        yield write
        with _user_errors(path):
            for whole, partial in partials.items():
                os.replace(partial, whole)


@contextlib.contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
