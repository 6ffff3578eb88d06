"""Checks a request to run a command and turns it into a job."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError
from cnx2_jax.launch import job as record
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.source import commit_of

MOST_SECONDS = 86_400
MOST_RETRIES = 86_400


def new_job(folder: Path, backend: str, command: Sequence[str], options: Mapping[str, Any]) -> Job:
    """Returns a new job that runs the commit checked out in the current directory.

    Args:
      folder: where its record goes; the last part is its name.
      backend: a key of `backends.BACKENDS`.
      command: what every host runs.
      options: `env`, `retries`, `backoff` and `grace` (see `Job`), and those of the backend.

    Raises:
      UserError: no command; a number out of its range; an environment variable that is not set; a relative
        `--workdir` in the command; no git repository, or one with uncommitted changes; or the name belongs to
        a job with another command that has not failed.
    """
    if not command:
        raise UserError("run needs a command after --, such as: -- cnx2 train --config ... --workdir ...")
    for name, most in (("retries", MOST_RETRIES), ("backoff", MOST_SECONDS), ("grace", MOST_SECONDS)):
        if not 0 <= options[name] <= most:
            raise UserError(f"--{name} {options[name]:g} must be 0 to {most}")
    _check_variables(options["env"])
    _check_workdir(command)
    repository, commit = commit_of(Path.cwd())
    shared = {name: options[name] for name in ("env", "retries", "backoff", "grace")}
    job = Job(
        folder=folder,
        name=folder.name,
        backend=backend,
        command=list(command),
        commit=commit,
        repository=repository,
        options={name: value for name, value in options.items() if name not in shared},
        **shared,
    )
    _check_name_is_free(job)
    return job


def _check_variables(names: Sequence[str]) -> None:
    for name in names:
        if not name.isidentifier():  # a value may be a secret, so we do not repeat it
            raise UserError(f"--env takes the name of a variable, not '{name.partition('=')[0]}=...'")
        if name not in os.environ:
            raise UserError(f"--env {name}: there is no such environment variable; export it first")


def _check_workdir(command: Sequence[str]) -> None:
    for index, argument in enumerate(command):
        flag, equals, value = argument.partition("=")
        if flag == "--workdir":
            path = value if equals else "".join(command[index + 1 : index + 2])
            if path and not path.startswith("/"):
                raise UserError(
                    f"--workdir {path} would be inside the source tree, which each attempt unpacks again; "
                    f"give an absolute path that every host sees, such as {Path.cwd() / path}"
                )


def _check_name_is_free(job: Job) -> None:
    before = record.read(job.folder)
    if before is None or before.state == "failed":  # a failed job may be corrected under its name
        return
    if (before.backend, before.command) != (job.backend, job.command):
        raise UserError(
            f"job '{job.name}' is of another command ({before.backend}: {shlex.join(before.command)}); "
            "choose another --name"
        )
