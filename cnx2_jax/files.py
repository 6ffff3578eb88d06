"""Writing files so that they are whole or not there, whenever the process dies."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from cnx2_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write a file to, and moves it to `path` unless the block raises.

    An older `path` is replaced. Raises whatever OSError writing or moving raises; nothing is left beside it.
    """
    # Process ids are not enough: those of containers that share a folder are often equal.
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, in the place of an older one; raises OSError."""
    with replacing(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def creating(out: Path) -> Iterator[Path]:
    """Gives a path of the same name to write a file or folder to, which then moves to `out`.

    Files written beside the given path move beside `out`, before `out` itself.

    Raises:
      UserError: something exists at `out`, or it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as folder:
            yield Path(folder) / out.name
            # `out` itself last: when it is there, so is everything it names.
            made = sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name)
            for path in made:
                if os.path.lexists(out.with_name(path.name)):
                    raise UserError(f"'{out.with_name(path.name)}' exists already; nothing was overwritten")
            for path in made:
                os.replace(path, out.with_name(path.name))
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}") from None


def check_new(path: Path, option: str) -> None:
    """Fails before the expensive work if `path` exists already or its folder cannot be written to.

    Args:
      path: where a file or folder is to be made.
      option: the option that gave it, for the message.

    Raises:
      UserError: it cannot be made there.
    """
    if os.path.lexists(path):
        raise UserError(f"'{path}' exists already; nothing was overwritten, choose another {option}")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"cannot write '{path}': '{folder}' is not a folder, or may not be written to")
