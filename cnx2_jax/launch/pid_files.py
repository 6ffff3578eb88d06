"""Processes that outlive whoever looks at them: who runs is seen by who holds a file, not by a number alone.

A process holds an exclusive lock on its pid file from before it starts until it and its children have ended,
however that happens. So a process id in such a file is never another process's.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.1
CLAIM_SECONDS = 1.0  # `holder` takes the lock for a moment to look


def claim(path: Path) -> int:
    """Locks a pid file, made if need be, and returns the descriptor that holds it.

    Raises:
      BlockingIOError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)  # who held it before has ended, and its number may be another's
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(POLL_SECONDS / 10)


def sign(descriptor: int, pid: int) -> None:
    """Writes a process id into a claimed pid file."""
    os.pwrite(descriptor, str(pid).encode(), 0)


def holder(path: Path) -> int | None:
    """Returns the id of the process that holds a pid file, if one does."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return int(file.read() or 0) or None  # empty: it is about to start


def start(
    words: Sequence[str], log: Path, pid_file: Path, directory: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Starts a process in a group of its own, its output appended to `log`."""
    descriptor = claim(pid_file)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a") as output:
            process = subprocess.Popen(
                words,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[descriptor],
            )
        sign(descriptor, process.pid)
        return process
    finally:
        os.close(descriptor)


def end_groups(pid_files: Iterable[Path], grace: float) -> None:
    """Ends what holds these pid files with its children: SIGTERM, and after `grace` seconds SIGKILL."""
    held = list(pid_files)
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        deadline = time.monotonic() + seconds
        for path in held:
            pid = holder(path)
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
        while any(holder(path) is not None for path in held) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
