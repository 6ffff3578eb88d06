"""Feature vectors in a NumPy file, with the names of its rows in a JSON file beside it."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, replacing

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
    with contextlib.ExitStack() as stack:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(replacing(path))
            # Left first, so that the vectors never stand without their names.
            partial_names = stack.enter_context(replacing(names_path(path)))
            partial_names.write_text(json.dumps(list(names)))
            # Unbuffered, so that nothing is left to fail when the file is closed.
            file = stack.enter_context(partial.open("wb", buffering=0))
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)}
            np.lib.format.write_array_header_1_0(file, header)

        def write(vectors: Float32[np.ndarray, "n dim"]) -> None:
            rest = memoryview(vectors.astype("<f4").tobytes())
            with _writing(path):
                while rest:
                    rest = rest[file.write(rest) :]

        yield write
        with _writing(path):
            stack.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
