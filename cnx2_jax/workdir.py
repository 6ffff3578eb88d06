"""The record of a run's config in its workdir."""

import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from cnx2_jax.configuration import flatten, from_json
from cnx2_jax.errors import UserError
from cnx2_jax.files import is_remote, try_to_write, write_text

RESULT = "result.json"  # marks a run as finished

# A run may resume with other values of these keys: they change where and how it computes, when it evaluates
# and how long it goes on, but not what an update does.
FREE_KEYS = (
    "mesh.",
    "model.layout",
    "model.remat",
    "model.scan",
    "log_steps",
    "profile_steps",
    "eval_epochs",
    "early_stopping_patience",
    "checkpoint_steps",
    "keep_checkpoints",
    "on_nonfinite",
    "max_nonfinite",
    "hang_seconds",
    "data.feature_cache",
)


def make_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the workdir; if it exists, checks that its `config.json` belongs to the same run.

    Raises:
      UserError: the workdir cannot be made, or belongs to a run with another config.
    """
    try:
        recorded = (workdir / "config.json").exists()
    except OSError as error:
        raise _cannot_write(workdir, error) from None
    if recorded:
        old, new = flatten(read_config(workdir)), flatten(config)
        changed = [
            f"{key} = {_shown(old, key)} there, {_shown(new, key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"workdir '{workdir}' holds another run ({'; '.join(changed[:3])}{more}); "
                "choose another --workdir, or give the same config to resume"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try_to_write(workdir)
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def record_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `config.json` into the workdir.

    Raises:
      UserError: see `make_workdir`.
    """
    make_workdir(config, workdir)
    try:
        write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(workdir, error) from None


def _cannot_write(workdir: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to workdir '{workdir}': {error.strerror}; choose another --workdir")


def read_config(workdir: Path) -> ConfigDict:
    """Reads the config of the run in a workdir.

    Raises:
      UserError: there is no `config.json`, or it is damaged.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or "task" not in values:
            raise ValueError("it is not the config of a run")
        return from_json(values)
    except OSError as error:
        if is_remote(workdir) and not isinstance(error, FileNotFoundError):
            raise UserError(f"cannot read '{path}': {error.strerror}") from None
        raise UserError(f"'{workdir}' is not a workdir: it has no config.json") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from None


def _shown(values: Mapping, key: str) -> str:
    return str(values.get(key, "unset")) or "''"
