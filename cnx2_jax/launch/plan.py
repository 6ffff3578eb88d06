"""What one attempt at a job runs, and the same as a shell script."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnx2_jax.launch.job import Job

LONGEST_DELAY = 600.0  # seconds: a machine that comes back is noticed within ten minutes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attempt at a job.

    Attributes:
      prepare: shell lines that run first; where they fail, so does the attempt.
      processes: words by name, started at once; all of them together are the job.
      directory: where they start.
      exports: environment variables that they get besides this process's own; nothing secret.
      clear: shell lines that end what an attempt that failed or was stopped may have left elsewhere.
    """

    prepare: Sequence[str]
    processes: Mapping[str, Sequence[str]]
    directory: Path
    exports: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clear: Sequence[str] = ()


def delays(retries: int, backoff: float) -> list[float]:
    """Returns the seconds to wait before each retry: doubling, at most `LONGEST_DELAY`, without jitter.

    Jitter keeps many clients from coming back at once; here there is one.
    """
    return [min(backoff * 2**retry, LONGEST_DELAY) for retry in range(retries)]


def script(lines: Sequence[str]) -> str:
    """Returns shell lines as a bash script that stops at the first failure."""
    return "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines, ""])


def written(path: Path, text: str) -> list[str]:
    """Returns the shell lines that write a file."""
    return [f"cat >{shlex.quote(str(path))} <<'END_OF_FILE'", *text.splitlines(), "END_OF_FILE"]


def render(job: Job, plan: Plan) -> str:
    """Returns the script of one attempt; what launch.py runs has these very words."""
    lines = [f"# {job.backend} job '{job.name}', commit {job.commit}.", ""]
    lines += [f"mkdir -p {shlex.quote(str(job.log('').parent))}", "", "# Prepare.", *plan.prepare]
    lines += [
        "",
        "# The processes, at once. Where one fails, launch.py ends the others; this waits for them.",
    ]
    lines.append(f"cd {shlex.quote(str(plan.directory))}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in plan.exports.items()]
    lines.append("processes=() status=0")
    for name, words in plan.processes.items():
        lines.append(f"{shlex.join(words)} >>{shlex.quote(str(job.log(name)))} 2>&1 & processes+=($!)")
    lines.append('for process in "${processes[@]}"; do wait "$process" || status=$?; done')
    if plan.clear:
        lines += ['if [ "$status" != 0 ]; then', *plan.clear, "fi"]
    lines.append('exit "$status"')
    return script(lines)
