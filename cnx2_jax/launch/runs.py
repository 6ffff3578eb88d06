"""The runs of a sweep: their names, commands and states, and a few of them at a time."""

import dataclasses
import re
import runpy
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnx2_jax import sweeps
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError, UserError, nearest
from cnx2_jax.launch import pid_files
from cnx2_jax.launch.supervise import say, stop_request

LOG_FOLDER = "logs"
GRACE_SECONDS = 180.0  # in which a run that is asked to stop saves; a launched one needs more than its own
PREFIX = "sweep_"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: `cnx2 train` in a workdir named by its overrides."""

    name: str
    workdir: Path
    overrides: sweeps.Overrides
    command: list[str]

    def state(self) -> str:
        """Returns finished, begun or new."""
        if (self.workdir / "result.json").exists():
            return "finished"
        return "begun" if (self.workdir / "config.json").exists() else "new"


def sweeps_of(location: str) -> dict[str, list[sweeps.Overrides]]:
    """Returns what the `sweep_NAME()` functions of a config `FILE.py[:RECIPE]` give, by NAME.

    Raises:
      UserError: see `configuration.load_config`.
    """
    load_config(location)  # which says what is wrong with the file
    found = runpy.run_path(location.partition(":")[0])
    return {
        name.removeprefix(PREFIX): function() for name, function in found.items() if name.startswith(PREFIX)
    }


def expand(location: str, sweep: str, common: Sequence[str], out: Path) -> list[Run]:
    """Returns the runs of a sweep, every one's config checked.

    Args:
      location: of the config, `FILE.py:RECIPE`.
      sweep: NAME of one of its functions `sweep_NAME`.
      common: `--config.KEY=VALUE` of all runs.
      out: the folder of the runs' workdirs.

    Raises:
      UserError: there is no such sweep, an override is wrong or swept as well, or two runs have one name.
    """
    known = sweeps_of(location)
    if sweep not in known:
        names = ", ".join(known) or "none"
        raise UserError(f"config '{location}' has no sweep '{sweep}'{nearest(sweep, known)} (known: {names})")
    given = {word.removeprefix("--config.").partition("=")[0] for word in common}
    runs: dict[str, Run] = {}
    for overrides in known[sweep]:
        both = given & overrides.keys()
        if both:
            raise UserError(f"--config.{min(both)} is what sweep '{sweep}' changes; leave it to the sweep")
        words = [*common, *sweeps.arguments(overrides)]
        load_config(location, words)
        name = _name(overrides)
        workdir = out.absolute() / name
        command = ["cnx2", "train", "--config", location, "--workdir", str(workdir), *words]
        run = Run(name, workdir, overrides, command)
        if runs.setdefault(name, run) != run:
            raise UserError(f"sweep '{sweep}' has two runs called '{name}'; make their values differ")
    if not runs:
        raise UserError(f"sweep '{sweep}' of '{location}' is empty")
    return list(runs.values())


def _name(overrides: Mapping) -> str:
    """Names a run by its overrides, by the last part of each key where that tells them apart."""
    short = [key.rpartition(".")[2] for key in overrides]
    keys = short if len(set(short)) == len(short) else list(overrides)
    pairs = (f"{key}={value}" for key, value in zip(keys, overrides.values(), strict=True))
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(pairs)) or "unchanged"


def run_all(
    commands: Mapping[str, Sequence[str]], folder: Path, workers: int, environment: Mapping[str, str]
) -> dict[str, int]:
    """Runs commands, at most `workers` at a time, and returns their exit statuses by name.

    Their output goes to `folder/logs/NAME.log`. One that fails does not keep the others from running.

    Raises:
      RunError: SIGINT or SIGTERM; it went to what was running.
      UserError: another process runs one of them.
    """
    waiting, statuses = dict(commands), {}
    running: dict[str, subprocess.Popen] = {}

    def pid_file(name: str) -> Path:
        return folder / LOG_FOLDER / f"{name}.pid"

    with stop_request() as asked:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = next(iter(waiting))
                    words = waiting.pop(name)
                    log = folder / LOG_FOLDER / f"{name}.log"
                    running[name] = pid_files.start(words, log, pid_file(name), Path.cwd(), environment)
                    say(f"{name}: {shlex.join(words)}")
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        statuses[name] = running.pop(name).returncode
                        say(f"{name}: ended with status {statuses[name]}")
                if asked.wait(pid_files.POLL_SECONDS):
                    raise RunError("asked to stop; the same command goes on")
        except BlockingIOError:
            raise UserError(f"another sweep runs '{name}' in '{folder}'; wait for it or stop it") from None
        except OSError as error:
            raise UserError(f"cannot run '{error.filename}': {error.strerror}") from None
        finally:
            pid_files.end_groups([pid_file(name) for name in running], GRACE_SECONDS)
            for process in running.values():
                process.wait()
    return statuses
