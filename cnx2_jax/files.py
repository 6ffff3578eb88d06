"""Paths, local or in object storage, and files that are whole or not there, whenever the process dies."""

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from cnx2_jax.errors import UserError


def to_path(text: str) -> Path:
    """Returns the path that a user gave: local, or `gs://BUCKET/NAME`, which takes the same methods.

    Raises:
      UserError: see `storage.storage_path`.
    """
    if "://" not in text:
        return Path(text)
    from cnx2_jax.storage import storage_path  # its client takes a second to import

    return storage_path(text)


def local_path(text: str) -> Path:
    """Returns a path that can only be local; raises UserError if it is in object storage."""
    if "://" in text:
        raise UserError(f"'{text}' must be on a local disk; copy it there, or mount the bucket")
    return Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path of `to_path` is in object storage."""
    return not isinstance(path, Path)


def exists(path: Path) -> bool:
    """Whether anything is at a path, such as a symbolic link that leads nowhere; raises OSError."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a local path to write a file to, and moves it to `path` unless the block raises.

    An older `path` is replaced. Raises whatever OSError writing or moving raises; nothing is left beside it.
    """
    if is_remote(path):
        with _uploading(path) as partial:
            yield partial
        return
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
def _uploading(out: Path) -> Iterator[Path]:
    """Gives a path in a temporary folder, and uploads what was written there unless the block raises."""
    with tempfile.TemporaryDirectory(prefix="cnx2-upload-") as folder:
        yield Path(folder) / out.name
        for path in _out_last(Path(folder), out):
            out.with_name(path.name).upload(path)  # type: ignore[attr-defined]


def _out_last(folder: Path, out: Path) -> list[Path]:
    """Returns what lies in a folder, `out` itself last: when it is there, so is everything it names."""
    return sorted(folder.iterdir(), key=lambda path: path.name == out.name)


@contextlib.contextmanager
def creating(out: Path) -> Iterator[Path]:
    """Gives a local path of the same name to write a file or folder to, which then moves to `out`.

    Files written beside the given path move beside `out`, before `out` itself.

    Raises:
      UserError: something exists at `out`, or it cannot be written.
    """
    try:
        if is_remote(out):
            with _uploading(out) as place:
                yield place
                _check_absent(place.parent, out)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as folder:
            yield Path(folder) / out.name
            _check_absent(Path(folder), out)
            for path in _out_last(Path(folder), out):
                os.replace(path, out.with_name(path.name))
    except OSError as error:
        raise UserError(f"cannot write '{out}': {error.strerror or error}") from None


def _check_absent(folder: Path, out: Path) -> None:
    """Raises UserError if something is where the files of a folder are to go."""
    for path in _out_last(folder, out):
        if exists(out.with_name(path.name)):
            raise UserError(f"'{out.with_name(path.name)}' exists already; nothing was overwritten")


@contextlib.contextmanager
def made_in(folder: Path) -> Iterator[Path]:
    """Gives a local folder for a library that writes files by itself: `folder`, or one to upload into it."""
    if is_remote(folder):
        with _uploading(folder) as place:
            place.mkdir()
            yield place
    else:
        yield folder


class Rows:
    """A text file that grows by lines, after those that it has.

    Args:
      path: the file.

    Raises:
      OSError: from this and every method, if the file cannot be written.
    """

    def __init__(self, path: Path):
        self._file = path.open("a")
        self._remote = is_remote(path)

    def write(self, text: str) -> None:
        """Adds text. It is on a local disk when this returns, and in object storage after `settle`."""
        self._file.write(text)
        self._file.flush()
        if not self._remote:
            os.fsync(self._file.fileno())

    def settle(self) -> None:
        """Uploads the rows that are not in the bucket yet; on a disk all are there already."""
        if self._remote:
            self._file.upload()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder for this process; the lock is released when the process ends, however it ends.

    In object storage, a killed process leaves a lock that expires; see `storage.leased`.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the folder cannot be opened.
    """
    if is_remote(folder):
        from cnx2_jax import storage

        with storage.leased(folder):
            yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def client_errors(path: Path) -> tuple[type[Exception], ...]:
    """Returns the types of a storage client's errors that are no OSError; none for a local path."""
    if not is_remote(path):
        return ()
    from cnx2_jax import storage

    return storage.errors()


def try_to_write(folder: Path) -> None:
    """Makes a file in an existing folder and removes it; raises OSError if that is not possible."""
    if is_remote(folder):
        probe = folder / f"probe-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.unlink()
    else:
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_new(path: Path, option: str) -> None:
    """Fails before the expensive work if `path` exists already or its folder cannot be written to.

    Args:
      path: where a file or folder is to be made.
      option: the option that gave it, for the message.

    Raises:
      UserError: it cannot be made there.
    """
    try:
        if exists(path):
            raise UserError(f"'{path}' exists already; nothing was overwritten, choose another {option}")
        if is_remote(path):
            return try_to_write(path.parent)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from None
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"cannot write '{path}': '{folder}' is not a folder, or may not be written to")
