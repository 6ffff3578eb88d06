"""Runs a job, shows its status and logs, and stops it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from cnx2_jax.errors import RunError, UserError
from cnx2_jax.launch import job as record
from cnx2_jax.launch import pid_files
from cnx2_jax.launch.backends import BACKENDS
from cnx2_jax.launch.job import LAUNCHER, Job
from cnx2_jax.launch.plan import render, script
from cnx2_jax.launch.supervise import USER_ERROR, held, supervise

SHOWN_LINES = 100  # of each log


def run(job: Job, *, dry_run: bool) -> None:
    """Runs a job to its end, or until a queue has accepted it, and prints its summary as JSON.

    Args:
      job: a new one, see `request.new_job`.
      dry_run: print the shell script of an attempt and run nothing.

    Raises:
      UserError: the job runs already, a program is missing, the backend refuses it, or the command ended with
        `USER_ERROR`.
      RunError: the last attempt failed.
    """
    backend = BACKENDS[job.backend]
    first = backend.plan(job)  # so that a backend refuses a job before it has a record
    if dry_run:
        print(render(job, first), end="")
        return
    with held(job):
        supervise(job, backend.plan, submits=backend.SUBMITS)
    print(json.dumps(summary(job)))
    if job.state == "failed":
        if job.status == USER_ERROR:
            raise UserError(f"job '{job.name}' ended with a user error and was not retried; see its logs")
        raise RunError(
            f"job '{job.name}' failed in attempt {job.attempt} with status {job.status}; see its logs"
        )


def status(job: Job, *, dry_run: bool) -> None:
    """Prints a job's summary as JSON, then what its backend shows."""
    if not dry_run:
        print(json.dumps(summary(job)))
    _shell(BACKENDS[job.backend].status(job), dry_run)


def logs(job: Job, *, dry_run: bool) -> None:
    """Prints the last lines of every log on this machine, then those that the backend has."""
    for log in sorted(job.log("*").parent.glob("*.log")):
        if dry_run:
            print(shlex.join(["tail", "-n", str(SHOWN_LINES), str(log)]))
            continue
        print(f"==> {log.stem} <==")
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
    _shell(BACKENDS[job.backend].logs(job), dry_run)


def stop(job: Job, *, dry_run: bool) -> None:
    """Ends a job wherever it runs and prints its summary as JSON.

    Processes on this machine get SIGTERM and, after the job's grace, SIGKILL.
    """
    alive = job.alive()
    if dry_run:
        for name, pid in alive.items():
            if name == LAUNCHER or LAUNCHER not in alive:
                print(f"kill -TERM {'' if name == LAUNCHER else '-'}{pid}  # {name}")
    elif LAUNCHER in alive:
        # The launcher ends the other processes, and what they left on other machines.
        os.kill(alive[LAUNCHER], signal.SIGTERM)
        while LAUNCHER in job.alive():
            time.sleep(pid_files.POLL_SECONDS)
    else:
        pid_files.end_groups([job.pid_file(name) for name in alive], job.grace)
    _shell(BACKENDS[job.backend].stop(job), dry_run)
    if not dry_run:
        job = record.read(job.folder) or job
        if job.state in ("running", "submitted"):
            job.state = "stopped"
            job.write()
        print(json.dumps(summary(job)))


def summary(job: Job) -> dict:
    """Returns a job's state as JSON.

    `state` is that of `Job`, or `orphaned` if the launcher was killed and its processes still run, or `lost`
    if they are gone too. `alive` names the processes that run on this machine.
    """
    alive = job.alive()
    state = job.state
    if state == "running" and LAUNCHER not in alive:
        state = "orphaned" if alive else "lost"
    return {
        "name": job.name,
        "backend": job.backend,
        "state": state,
        "attempt": job.attempt,
        "status": job.status,
        "commit": job.commit,
        "alive": sorted(alive),
        "logs": str(job.log("*")),
    }


def _shell(lines: Sequence[str], dry_run: bool) -> None:
    if dry_run:
        print("\n".join(lines))
        return
    sys.stdout.flush()
    for line in lines:
        try:
            done = subprocess.run(["bash", "-c", script([line])])
        except OSError as error:
            raise UserError(f"cannot run '{error.filename}': {error.strerror}") from None
        if done.returncode:
            raise RunError(f"`{line}` failed with status {done.returncode}")
