"""Files that show whether a process still runs, across restarts of the launcher.

A process and its children hold an exclusive lock on its pid file until the last of them has ended, however
that happens. So a locked file names a process that runs, and a reused process id is never mistaken for it.
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
CLAIM_SECONDS = 1.0  # a concurrent `holder` takes a shared lock for a moment


def claim(path: Path) -> int:
    """Creates a pid file if necessary, locks it and returns the descriptor that holds the lock.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)  # the id of the earlier process may be reused by now
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
    """Returns the id of the process that holds a pid file, or None."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return int(file.read() or 0) or None  # empty: claimed, and the process is about to start


def start(
    command: Sequence[str], log: Path, pid_file: Path, directory: Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    """Starts a process in a new process group and appends its output to `log`.

    Raises:
      BlockingIOError: another process holds the pid file.
      OSError: the program cannot be run.
    """
    descriptor = claim(pid_file)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
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
    """Ends the processes that hold these pid files, and their children.

    Sends SIGTERM, and SIGKILL to those that still run after `grace` seconds.
    """
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
