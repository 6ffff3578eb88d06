"""Runs attempts at a job until one succeeds, no retries are left, or the user stops it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cnx2_jax.errors import UserError
from cnx2_jax.launch import pid_files
from cnx2_jax.launch.job import LAUNCHER, Job
from cnx2_jax.launch.plan import Plan, delays, script

USER_ERROR = 2  # the exit status after a mistake of the user's, which a retry would only repeat


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Yields an event that SIGINT and SIGTERM set, instead of ending this process."""
    asked = threading.Event()
    old = {
        number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held(job: Job) -> Iterator[None]:
    """Makes this process the launcher of a job.

    Raises:
      UserError: the job has a launcher, or processes that outlived one.
    """
    try:
        descriptor = pid_files.claim(job.pid_file(LAUNCHER))
    except BlockingIOError:
        raise UserError(f"job '{job.name}' runs already; see its status, or end it with stop") from None
    try:
        orphans = job.alive().keys() - {LAUNCHER}
        if orphans:
            raise UserError(
                f"{', '.join(sorted(orphans))} of job '{job.name}' still run, but their launcher is gone; "
                "end them with stop"
            )
        pid_files.sign(descriptor, os.getpid())
        yield
    finally:
        os.close(descriptor)


def supervise(job: Job, plan: Callable[[Job], Plan], *, submits: bool) -> None:
    """Runs attempts at a job that this process holds, and leaves the outcome in `job.state` and `job.status`.

    When a process fails, the others are ended and the attempt has failed. The next one starts after a delay
    of `plan.delays`, unless the status was `USER_ERROR`. The command itself must resume from its last
    checkpoint, as `cnx2 train` does.

    Args:
      job: a job that is `held`; its record is updated.
      plan: returns the next attempt at it.
      submits: whether the processes hand the job to a queue, which then does the retries.

    Raises:
      UserError: a program does not exist.
    """
    waits = [] if submits else delays(job.retries, job.backoff)
    with stop_request() as asked:
        for attempt in range(1, len(waits) + 2):
            job.state, job.attempt, job.status = "running", attempt, None
            job.write()
            say(f"{job.name}: attempt {attempt} of {len(waits) + 1}, logs in {job.log('*')}")
            try:
                job.status = _attempt(job, plan(job), asked)
            except OSError as error:
                job.state = "failed"
                job.write()
                raise UserError(f"cannot run '{error.filename}': {error.strerror}") from None
            if job.status == 0 or asked.is_set() or job.status == USER_ERROR or attempt > len(waits):
                break
            say(f"{job.name}: failed with status {job.status}, trying again in {waits[attempt - 1]:g} s")
            if asked.wait(waits[attempt - 1]):
                break
    if asked.is_set():
        job.state = "stopped"
    elif job.status == 0:
        job.state = "submitted" if submits else "finished"
    else:
        job.state = "failed"
    job.write()


def _attempt(job: Job, plan: Plan, asked: threading.Event) -> int:
    """Runs one attempt and returns its first exit status other than 0, or 0."""
    for log in job.log("*").parent.glob("*.log"):
        with log.open("a") as file:
            file.write(f"--- attempt {job.attempt}\n")
    if _shell(job, "prepare", plan.prepare, asked) or asked.is_set():
        return 1  # gcloud and git may end with 2, which would read as a user error
    status = _run(job, plan.processes, plan.directory, plan.exports, asked)
    if plan.clear and status:
        _shell(job, "clear", plan.clear, threading.Event())  # not interrupted by a second request to stop
    return status


def _shell(job: Job, name: str, lines: Sequence[str], asked: threading.Event) -> int:
    path = job.folder / f"{name}.sh"
    path.write_text(script(lines))
    return _run(job, {name: ["bash", str(path)]}, job.folder, {}, asked)


def _run(
    job: Job,
    commands: Mapping[str, Sequence[str]],
    directory: Path,
    exports: Mapping[str, str],
    asked: threading.Event,
) -> int:
    """Runs processes until all have ended, one fails or a stop is requested; then ends the rest."""
    environment = {**os.environ, **exports}
    running = {}
    try:
        for name, command in commands.items():
            running[name] = pid_files.start(
                command, job.log(name), job.pid_file(name), directory, environment
            )
        while True:
            statuses = {name: process.poll() for name, process in running.items()}
            for name, status in statuses.items():
                if status:
                    say(f"{job.name}: {name} ended with status {status}, see {job.log(name)}")
                    return status
            if all(status == 0 for status in statuses.values()):
                return 0
            if asked.wait(pid_files.POLL_SECONDS):
                say(f"{job.name}: stopping")
                return 1
    finally:
        pid_files.end_groups([job.pid_file(name) for name in running], job.grace)
        for process in running.values():
            process.wait()
