"""The record of a job: `FOLDER/NAME/job.json`, `logs/` and `pids/`."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError
from cnx2_jax.launch import pid_files

LAUNCHER = "launcher"  # the process that started the others and watches them


@dataclasses.dataclass
class Job:
    """What `run` was asked for, and how it went.

    Attributes:
      folder: where its record is, absolute.
      name: of the job, on this machine and wherever it runs.
      backend: a key of `launch.BACKENDS`.
      command: the words to run on every host.
      commit: the git commit whose tree is shipped.
      repository: where that commit is.
      env: names of environment variables that the command needs; their values are nowhere here.
      options: the backend's.
      retries: how often a failed attempt is followed by another.
      backoff: seconds before the first retry.
      grace: seconds from SIGTERM to SIGKILL.
      state: new, running, submitted, finished, failed or stopped.
      attempt: the latest one, from 1 on.
      status: the exit status of the latest attempt, where it has ended.
    """

    folder: Path
    name: str
    backend: str
    command: list[str]
    commit: str
    repository: Path
    env: list[str]
    options: dict[str, Any]
    retries: int
    backoff: float
    grace: float
    state: str = "new"
    attempt: int = 0
    status: int | None = None

    @property
    def source(self) -> Path:
        """Where the shipped tree lies on this machine."""
        return self.folder / "source"

    def log(self, process: str) -> Path:
        """Where a process's output goes."""
        return self.folder / "logs" / f"{process}.log"

    def pid_file(self, process: str) -> Path:
        """The file that a process holds while it lives; see `pid_files`."""
        return self.folder / "pids" / process

    def alive(self) -> dict[str, int]:
        """Returns the process ids of what runs on this machine, the launcher among them, by name."""
        found = {path.name: pid_files.holder(path) for path in sorted((self.folder / "pids").glob("*"))}
        return {name: pid for name, pid in found.items() if pid is not None}

    def write(self) -> None:
        """Writes `job.json`, whole or not at all."""
        values = {**dataclasses.asdict(self), "folder": str(self.folder), "repository": str(self.repository)}
        partial = self.folder / "job.tmp"
        partial.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(partial, self.folder / "job.json")


def check_name(name: str) -> None:
    """Raises UserError for a name that some backend would refuse."""
    if len(name) > 40 or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UserError(
            f"job name '{name}' must be at most 40 of a-z, 0-9 and -, from a letter to a letter or digit"
        )


def read(folder: Path) -> Job | None:
    """Returns the job whose record `folder` is, if it is one.

    Raises:
      UserError: it is damaged.
    """
    path = folder / "job.json"
    try:
        values = json.loads(path.read_text())
        return Job(**{**values, "folder": Path(values["folder"]), "repository": Path(values["repository"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' is damaged: {error}; remove '{folder}' to begin anew") from None
