"""The runs of a sweep: their names, commands and states, and running a few of them at a time."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnx2_jax import sweeps
from cnx2_jax.configuration import load_config, load_module
from cnx2_jax.errors import RunError, UserError, nearest
from cnx2_jax.launch import pid_files
from cnx2_jax.launch.local import search_path
from cnx2_jax.launch.supervise import say, stop_request

LOG_FOLDER = "logs"
GRACE_SECONDS = 180.0  # from SIGTERM to SIGKILL; longer than the default grace of a launched job
PREFIX = "sweep_"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: `cnx2 train` in a workdir named after its overrides.

    Attributes:
      name: unique in its sweep, and the last part of its workdir.
      workdir: absolute.
      overrides: the config keys that the sweep sets for this run.
      command: the arguments that train it on this machine.
    """

    name: str
    workdir: Path
    overrides: sweeps.Overrides
    command: list[str]

    def state(self) -> str:
        """Returns `finished`, `begun` or `new`, as its workdir shows."""
        if self._result_file.exists():
            return "finished"
        return "begun" if (self.workdir / "config.json").exists() else "new"

    def result(self) -> dict:
        """Returns the metrics and the `step` of a finished run's result; empty for another run."""
        return json.loads(self._result_file.read_text()) if self._result_file.exists() else {}

    @property
    def _result_file(self) -> Path:
        return self.workdir / "result.json"


def sweeps_of(location: str) -> dict[str, list[sweeps.Overrides]]:
    """Returns the results of all `sweep_NAME()` functions in a config file, by NAME.

    Args:
      location: of the config, as `configuration.load_module` takes it.

    Raises:
      UserError: see `configuration.load_module`.
    """
    module, _ = load_module(location)
    return {
        name.removeprefix(PREFIX): function()
        for name, function in vars(module).items()
        if name.startswith(PREFIX)
    }


def expand(location: str, sweep: str, common: Sequence[str], out: Path) -> list[Run]:
    """Returns the runs of a sweep, after checking the config of each.

    Args:
      location: of the config, as `configuration.load_config` takes it.
      sweep: NAME of one of its functions `sweep_NAME`.
      common: `--config.KEY=VALUE` overrides for all runs.
      out: the folder of the runs' workdirs.

    Raises:
      UserError: there is no such sweep, it is empty, an override is invalid, the sweep sets the key of a
        common override, or two different runs have the same name.
    """
    known = sweeps_of(location)
    if sweep not in known:
        names = ", ".join(known) or "none"
        raise UserError(f"config '{location}' has no sweep '{sweep}'{nearest(sweep, known)} (known: {names})")
    given = {override.removeprefix("--config.").partition("=")[0] for override in common}
    runs: dict[str, Run] = {}
    for overrides in known[sweep]:
        both = given & overrides.keys()
        if both:
            raise UserError(f"--config.{min(both)} is what sweep '{sweep}' changes; leave it out")
        arguments = [*common, *sweeps.arguments(overrides)]
        load_config(location, arguments)
        name = _name(overrides)
        workdir = out.absolute() / name
        command = ["cnx2", "train", "--config", location, "--workdir", str(workdir), *arguments]
        run = Run(name, workdir, overrides, command)
        if runs.setdefault(name, run) != run:
            raise UserError(
                f"sweep '{sweep}' has two runs called '{name}'; make their values differ in letters or digits"
            )
    if not runs:
        raise UserError(f"sweep '{sweep}' of '{location}' is empty")
    return list(runs.values())


def _name(overrides: Mapping) -> str:
    """Returns a run's name: `KEY=VALUE,...`, with the last part of each key if those parts are unique."""
    short = [key.rpartition(".")[2] for key in overrides]
    keys = short if len(set(short)) == len(short) else list(overrides)
    pairs = (f"{key}={value}" for key, value in zip(keys, overrides.values(), strict=True))
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(pairs)) or "unchanged"


def launch_command(run: Run, out: Path, backend: Sequence[str]) -> list[str]:
    """Returns the arguments that run a run through `cnx2 launch`.

    Args:
      run: a run of a sweep.
      out: the folder of the sweep; the job's record goes to `out/launch`.
      backend: a backend of `cnx2 launch` and its options. The job's name is short and a function of `out` and
        of the run's name, so the same sweep finds its jobs again.
    """
    sweep = re.sub("[^a-z0-9]+", "-", out.absolute().name.lower()).strip("-")[:24]
    job = f"sweep-{sweep}-{hashlib.sha256(run.name.encode()).hexdigest()[:8]}"
    launch = [sys.executable, "-m", "cnx2_jax.cli", "launch", backend[0], "run"]
    record = ["--name", job, "--record", str(out.absolute() / "launch")]
    return [*launch, *record, *backend[1:], "--", *run.command]


def broken(runs: Sequence[Run], statuses: Mapping[str, int], *, launched: bool) -> list[str]:
    """Returns the names of the runs that failed, or ended before they were finished.

    Args:
      runs: the runs of a sweep.
      statuses: exit statuses by name, see `run_all`; a run without one did not start and is left out.
      launched: whether the runs went through `cnx2 launch`, whose status 0 can mean that a job waits in a
        queue.
    """
    return [
        run.name
        for run in runs
        if run.name in statuses and (statuses[run.name] or not (launched or run.state() == "finished"))
    ]


def run_all(commands: Mapping[str, Sequence[str]], folder: Path, workers: int) -> dict[str, int]:
    """Runs commands, at most `workers` at a time, and returns their exit statuses by name.

    Output is appended to `folder/logs/NAME.log`. A command that fails does not keep the others from running.

    Raises:
      RunError: SIGINT or SIGTERM; the commands that were running have been stopped.
      UserError: another process runs one of them, or a program does not exist.
    """
    environment = {**os.environ, "PATH": search_path()}
    waiting, statuses = dict(commands), {}
    running: dict[str, subprocess.Popen] = {}

    def pid_file(name: str) -> Path:
        return folder / LOG_FOLDER / f"{name}.pid"

    with stop_request() as asked:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = next(iter(waiting))
                    command = waiting.pop(name)
                    log = folder / LOG_FOLDER / f"{name}.log"
                    running[name] = pid_files.start(command, log, pid_file(name), Path.cwd(), environment)
                    say(f"{name}: {shlex.join(command)}")
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        statuses[name] = running.pop(name).returncode
                        say(f"{name}: ended with status {statuses[name]}")
                if asked.wait(pid_files.POLL_SECONDS):
                    raise RunError("stopped by a signal; the same command resumes the sweep")
        except BlockingIOError:
            raise UserError(f"another sweep runs '{name}' in '{folder}'; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"cannot run '{error.filename}': {error.strerror}") from None
        finally:
            pid_files.end_groups([pid_file(name) for name in running], GRACE_SECONDS)
            for process in running.values():
                process.wait()
    return statuses
