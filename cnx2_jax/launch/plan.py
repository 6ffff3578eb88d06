"""One attempt at a job: what it runs, and the same as a shell script."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnx2_jax.launch.job import Job

LONGEST_DELAY = 600.0  # seconds, so that we notice within ten minutes when a machine is back


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attempt at a job.

    Attributes:
      prepare: shell lines that run first; if one fails, the attempt has failed.
      processes: arguments by process name. All start at once, and the attempt succeeds if all of them do.
      directory: the working directory of the processes.
      exports: environment variables to add to those of the launcher; nothing secret.
      clear: shell lines that end processes which a failed or stopped attempt may have left on other machines.
    """

    prepare: Sequence[str]
    processes: Mapping[str, Sequence[str]]
    directory: Path
    exports: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clear: Sequence[str] = ()


def delays(retries: int, backoff: float) -> list[float]:
    """Returns the seconds to wait before each retry: `backoff`, then doubling up to `LONGEST_DELAY`.

    There is no jitter, because one client retries and not many at once.
    """
    return [min(backoff * 2**retry, LONGEST_DELAY) for retry in range(retries)]


def script(lines: Sequence[str]) -> str:
    """Returns shell lines as a bash script that stops at the first failure."""
    return "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines, ""])


def written(path: Path, text: str) -> list[str]:
    """Returns the shell lines that write a file."""
    return [f"cat >{shlex.quote(str(path))} <<'END_OF_FILE'", *text.splitlines(), "END_OF_FILE"]


def render(job: Job, plan: Plan) -> str:
    """Returns one attempt as a bash script, with the same commands that `supervise` runs."""
    lines = [f"# {job.backend} job '{job.name}', commit {job.commit}.", ""]
    lines += [f"mkdir -p {shlex.quote(str(job.log('').parent))}", "", "# Prepare.", *plan.prepare]
    lines += [
        "",
        "# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.",
    ]
    lines.append(f"cd {shlex.quote(str(plan.directory))}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in plan.exports.items()]
    lines.append("processes=() status=0")
    for name, command in plan.processes.items():
        lines.append(f"{shlex.join(command)} >>{shlex.quote(str(job.log(name)))} 2>&1 & processes+=($!)")
    lines.append('for process in "${processes[@]}"; do wait "$process" || status=$?; done')
    if plan.clear:
        lines += ['if [ "$status" != 0 ]; then', *plan.clear, "fi"]
    lines.append('exit "$status"')
    return script(lines)
