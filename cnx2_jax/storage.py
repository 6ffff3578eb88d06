"""Paths in Google Cloud Storage, `gs://BUCKET/NAME`: all that differs between a bucket and a disk.

Nothing imports this module before a path of that form is met; see `files.to_path`.

A bucket has objects, not files: an object appears whole or not at all, folders are only prefixes of names,
and nothing can be appended to, locked or memory-mapped.
"""

import contextlib
import errno
import fnmatch
import functools
import importlib.util
import io
import os
import re
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, cast

import fsspec
from etils.epath.gpath import PosixGPath

from cnx2_jax.errors import RunError, UserError

UPLOAD_SECONDS = 30  # an object that grows is written again at most this often
UPLOAD_RATE = 2**20  # and never faster than this many bytes per second, on average
LEASE_SECONDS = 60  # a lock that nobody renews for so long is free


def storage_path(text: str) -> Path:
    """Returns the path of a `gs://` address.

    It has the methods of `pathlib.Path` that this package uses, and they raise an OSError with `strerror` and
    `filename`, as those do.

    Raises:
      UserError: another scheme, no bucket, or the client libraries are not installed.
    """
    if not re.match(r"gs://[a-z0-9]", text):
        raise UserError(f"'{text}': only local paths and gs://BUCKET/NAME can be read and written")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"'{text}' needs the client of object storage; pip install 'cnx2_jax[storage]'")
    _prepare()
    return cast(Path, StoragePath(text))


@functools.cache
def _prepare() -> None:
    """Sets how epath, through which Orbax and TensorFlow Datasets work too, reaches the bucket."""
    # TensorStore, other processes and other hosts write objects that a cached listing would not show.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


class StoragePath(PosixGPath):
    """A path in a bucket; see `storage_path`."""

    def absolute(self) -> "StoragePath":
        return self

    def expanduser(self) -> "StoragePath":
        return self

    def exists(self) -> bool:
        return bool(self._kind())

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def _kind(self) -> str:
        """Returns `file`, `directory` or nothing."""
        # The client's own functions of this kind take every error for a missing object.
        try:
            with _errors(self):
                return _client().info(str(self))["type"]
        except FileNotFoundError:
            return ""

    def iterdir(self) -> Iterator["StoragePath"]:
        with _errors(self):
            return iter(list(super().iterdir()))

    def glob(self, pattern: str) -> Iterator["StoragePath"]:
        """Yields the paths directly below this one whose names match."""
        # Not the client's own, for which this path would be a pattern too.
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder exists as long as something is in it."""

    def rename(self, target: PurePath | str) -> "StoragePath":
        """Copies every object of a folder and then deletes the old ones, which is not atomic."""
        with _errors(self):
            return super().rename(target)

    def unlink(self, missing_ok: bool = False) -> None:
        with _errors(self):
            super().unlink(missing_ok=missing_ok)

    def read_bytes(self) -> bytes:
        with _errors(self):
            return _client().cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        with _errors(self):
            _client().pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def open(self, mode: str = "r", *, encoding: str | None = None, **options: Any) -> Any:
        """Opens the object: for reading it is fetched whole, for writing this gives an `Upload`."""
        if "r" not in mode:
            return Upload(self, mode)
        content = io.BytesIO(self.read_bytes())
        return content if "b" in mode else io.TextIOWrapper(content, encoding or "utf-8", **options)

    def upload(self, local: Path) -> None:
        """Copies a local file to this path, or all files of a folder to paths below it."""
        if not local.is_dir():
            with _errors(self):
                return _client().put_file(str(local), str(self))
        # Backwards, so that what describes the others (`card`, `config.json`) comes last: without it, no
        # reader takes an upload that was interrupted for a whole one.
        for path in sorted((path for path in local.rglob("*") if path.is_file()), reverse=True):
            (self / str(path.relative_to(local))).upload(path)


class Upload:
    """A file that is written or appended to: a local copy, which becomes the object again and again.

    Args:
      path: the object.
      mode: `w` or `a`, with `b` for bytes.

    Raises:
      OSError: from this and every method, if the object cannot be read or written.
    """

    def __init__(self, path: StoragePath, mode: str):
        self._path = path
        self._file = tempfile.NamedTemporaryFile(mode.replace("a", "w"))  # noqa: SIM115
        self._next = 0.0
        if "a" in mode and path.exists():
            self._file.write(path.read_bytes() if "b" in mode else path.read_text())

    def write(self, data: Any) -> int:
        """Adds text or bytes."""
        return self._file.write(data)

    def flush(self) -> None:
        """Writes the object if it was not written just before."""
        if time.monotonic() >= self._next:
            self.upload()

    def upload(self) -> None:
        """Writes the object, with everything written so far."""
        self._file.flush()
        self._path.upload(Path(self._file.name))
        pause = max(UPLOAD_SECONDS, self._file.tell() / UPLOAD_RATE)
        self._next = time.monotonic() + pause

    def close(self) -> None:
        """Writes the object for the last time."""
        with self._file:
            self.upload()


def errors() -> tuple[type[Exception], ...]:
    """Returns the exception types of the client libraries, which Orbax lets through."""
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return HttpError, GoogleAPIError, GoogleAuthError, ClientError


@contextlib.contextmanager
def _errors(path: PurePath) -> Iterator[None]:
    """Turns what the client libraries raise into the OSErrors of a disk, or a RunError; see `_as_oserror`."""
    try:
        yield
    except (UserError, RunError, BlockingIOError):
        raise
    except Exception as error:  # they have four families of exceptions, some without a common base
        raise _as_oserror(error, str(path)) from error


def _as_oserror(error: Exception, path: str) -> OSError:
    """Returns the OSError for what the user can mend.

    Raises:
      RunError: anything else, such as a server that does not answer, where another try may succeed.
    """
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    if isinstance(error, OSError) and error.filename:
        return error  # of this module itself
    text = (str(error) or type(error).__name__).splitlines()[0]
    known = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}
    for kind, number in known.items():
        if isinstance(error, kind):
            return kind(number, os.strerror(number), path)
    refused = getattr(error, "code", None) in (401, 403) or text.startswith("Forbidden")
    if refused or isinstance(error, (DefaultCredentialsError, RefreshError)):
        return PermissionError(errno.EACCES, f"permission denied ({text})", path)
    raise RunError(f"'{path}': {text}") from error


@functools.cache
def _client() -> Any:
    return fsspec.filesystem("gs", finalize_on_close=True)  # as epath makes it, so both are one


@contextlib.contextmanager
def leased(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder: the object `lock`, which the owner writes again while it lives.

    An owner that was killed leaves its lock, so a new one waits LEASE_SECONDS to see whether it is renewed.
    An owner that finds its lock taken over ends the process, with status 1.

    Raises:
      BlockingIOError: another process renews the lock.
      OSError: the bucket cannot be written to.
    """
    with _errors(folder):
        lease = _Lease(folder / "lock")
        lease.take()
    ended = threading.Event()
    renewing = threading.Thread(target=lease.renew_until, args=(ended,), daemon=True, name="cnx2-lease")
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        lease.release()


class _Lease:
    """The lock object. A write states the generation that it replaces, so of two owners one fails."""

    def __init__(self, path: Path):
        from google.cloud import storage

        self._path = path
        bucket, _, name = str(path).removeprefix("gs://").partition("/")
        self._object = storage.Client(project=None).bucket(bucket).blob(name)  # objects need no project
        self._token = f"{uuid.uuid4().hex}\n"

    def take(self) -> None:
        """Becomes the owner; raises BlockingIOError if another one is alive."""
        if self._write(0):
            return
        old = self._generation()
        print(
            f"'{self._path.parent}' is locked; waiting {LEASE_SECONDS:g} s to see whether its run is alive",
            file=sys.stderr,
        )
        ends = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < ends:
            time.sleep(min(1, LEASE_SECONDS / 4))
            if self._generation() != old:
                break  # renewed, or released: then its generation is 0
        if not self._write(old if self._generation() == old else 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self._path))

    def renew_until(self, ended: threading.Event) -> None:
        """Renews the lock until the event is set."""
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                kept = self._write(self._generation_held)
            except Exception as error:  # of several libraries; the run goes on while the lock may be its own
                print(f"cannot renew '{self._path}', trying again: {error}", file=sys.stderr)
                continue
            if not kept:
                line = f"cnx2: stopped: '{self._path}' was taken over by another run, or deleted"
                print(f"{line}; only one run may write to its folder", file=sys.stderr, flush=True)
                os._exit(1)

    def release(self) -> None:
        """Deletes the lock. If that fails, the next owner waits for it to expire."""
        with contextlib.suppress(*errors()):
            self._object.delete(if_generation_match=self._generation_held)

    def _generation(self) -> int:
        """Returns the generation of the object that is there, 0 if there is none."""
        from google.api_core.exceptions import NotFound

        try:
            self._object.reload()
        except NotFound:
            return 0
        return self._object.generation

    def _write(self, replaced: int) -> bool:
        """Writes the lock in the place of a generation; returns whether it is ours now."""
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._object.upload_from_string(
                self._token, if_generation_match=replaced, timeout=LEASE_SECONDS / 4
            )
        except PreconditionFailed:
            # The client repeats a request whose answer was lost, and then meets its own object.
            if not self._generation() or self._object.download_as_text() != self._token:
                return False
        self._generation_held = self._object.generation
        return True
