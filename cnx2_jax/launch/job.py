"""The record of a job on this machine: `FOLDER/NAME/job.json`, with `logs/` and `pids/` beside it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError
from cnx2_jax.files import write_text
from cnx2_jax.launch import pid_files

LAUNCHER = "launcher"  # the process that starts the others and watches them


@dataclasses.dataclass
class Job:
    """A command to run on hosts, and how far it has come.

    Attributes:
      folder: the folder of its record, absolute.
      name: its name, on this machine and wherever it runs.
      backend: a key of `backends.BACKENDS`.
      command: the arguments to run on every host.
      commit: the git commit whose tree is shipped.
      repository: the git repository with that commit.
      env: names of environment variables that the command needs; their values are never recorded.
      options: the options of the backend, by name.
      retries: how many attempts may follow the first.
      backoff: seconds before the first retry.
      grace: seconds from SIGTERM to SIGKILL.
      state: new, running, submitted, finished, failed or stopped.
      attempt: the number of the latest attempt, counted from 1.
      status: the exit status of the latest attempt; None until it has ended.
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
        """The folder on this machine that the commit's tree is unpacked into."""
        return self.folder / "source"

    def log(self, process: str) -> Path:
        """Returns the file that a process's output is appended to."""
        return self.folder / "logs" / f"{process}.log"

    def pid_file(self, process: str) -> Path:
        """Returns the file that a process locks while it runs; see `pid_files`."""
        return self.folder / "pids" / process

    def alive(self) -> dict[str, int]:
        """Returns the ids of the processes that run on this machine, by name; the launcher is one of them."""
        found = {path.name: pid_files.holder(path) for path in sorted((self.folder / "pids").glob("*"))}
        return {name: pid for name, pid in found.items() if pid is not None}

    def write(self) -> None:
        """Writes `job.json` atomically."""
        values = {**dataclasses.asdict(self), "folder": str(self.folder), "repository": str(self.repository)}
        write_text(self.folder / "job.json", json.dumps(values, indent=2) + "\n")


def check_name(name: str) -> None:
    """Raises UserError unless every backend accepts this name for a job."""
    if len(name) > 40 or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise UserError(
            f"job name '{name}' must be at most 40 characters of a-z, 0-9 and -, "
            "starting with a letter and ending with a letter or digit"
        )


def read(folder: Path) -> Job | None:
    """Returns the job recorded in a folder, or None if there is no record.

    Raises:
      UserError: the record is damaged.
    """
    path = folder / "job.json"
    try:
        values = json.loads(path.read_text())
        if values["name"] != folder.name:  # a checked name; commands on this machine and others contain it
            raise ValueError(f"it is of job {values['name']!r}")
        return Job(**{**values, "folder": Path(values["folder"]), "repository": Path(values["repository"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' is damaged: {error}; remove '{folder}' to start over") from None
