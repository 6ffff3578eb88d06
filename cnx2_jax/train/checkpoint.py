"""Orbax checkpoints: save, restore, and find the parameters in what a user points at.

A run's checkpoint is a folder `checkpoints/STEP` with `params` (arrays by dotted name), `card` (JSON: what
a user of the parameters must know), `opt_state` and, where the run keeps an average of its parameters, `ema`.
An exported checkpoint has `params` and `card` alone, so one reader serves both.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cnx2_jax.errors import UserError
from cnx2_jax.train.state import Params, TrainState


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous, and a folder appears only when it is whole.

    Args:
      directory: `workdir/checkpoints`, created if need be.
      keep: how many of the latest to keep; the best by `best` is kept besides.
      best: evaluation metric and the end of it that is good.
    """

    def __init__(self, directory: Path, *, keep: int, best: tuple[str, Literal["max", "min"]]):
        metric, end = best

        def value(metrics: dict[str, float]) -> float:
            return metrics[metric]

        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=value,
                    reverse=end == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=value,  # unused beside the policy, but without it metrics are not written
                best_mode=end,
                cleanup_tmp_directories=True,
                step_prefix=None,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "ema": ocp.StandardCheckpointHandler(),
                "card": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Returns the step of the latest whole checkpoint, if there is one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, card: dict, metrics: dict[str, float] | None) -> None:
        """Begins to save; the arrays may be donated as soon as this returns. `metrics` rank the best.

        A step that is there already is replaced: it was saved before it was evaluated.
        """
        if step in self._manager.all_steps():
            self._manager.wait_until_finished()
            self._manager.delete(step)
        items = _items(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                card=ocp.args.JsonSave(card),
                **{name: ocp.args.StandardSave(item) for name, item in items.items()},
            ),
            metrics=metrics,
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a step onto the shapes, dtypes and shardings of `like`."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(item) for name, item in _items(like).items()}
            ),
        )
        count = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(count, items["params"], items["opt_state"], items.get("ema"))

    def best(self) -> Path:
        """Returns the folder of the best checkpoint; the latest where none was evaluated."""
        return self.directory / str(self._manager.best_step())

    def close(self) -> None:
        """Waits for what is being saved; an error in saving is raised here at the latest."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "opt_state": state.opt_state}
    return items if state.ema is None else {**items, "ema": state.ema}


def find(path: Path) -> Path:
    """Returns the folder with `params` and `card` that `path` means.

    Args:
      path: `checkpoints/STEP` of a run, a workdir (its latest), or an exported checkpoint.

    Raises:
      UserError: there is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    if (path / "params").is_dir():
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    found = [p for p in folder.glob("*") if p.name.isdigit() and p.is_dir()] if folder.is_dir() else []
    steps = [int(p.name) for p in found]
    if not steps:
        raise UserError(
            f"no checkpoint in '{path}'; give a workdir, its checkpoints/STEP, or an exported checkpoint"
        )
    return folder / str(max(steps))


def read_card(path: Path) -> dict:
    """Returns the card of the checkpoint folder `path` (see `find`)."""
    try:
        card = json.loads((path / "card" / "metadata").read_text())
        if not {"config", "class_names"} <= card.keys():
            raise ValueError("another program's card")
        return card
    except (OSError, ValueError, AttributeError):
        raise UserError(f"checkpoint '{path}' has no readable card; was it written by cnx2?") from None


def read_params(path: Path, *, averaged: bool = True) -> Params:
    """Reads the parameters of the checkpoint folder `path` (see `find`) onto this process's first device.

    They are float32, whatever they were exported in.

    Args:
      path: the folder.
      averaged: whether to read their average, where the run keeps one; it is what a recipe's accuracy is of.

    Raises:
      UserError: they cannot be read.
    """
    folder = ((path / "ema") if averaged and has_average(path) else (path / "params")).absolute()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata
            like = {
                name: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=device)
                for name, leaf in dict(tree).items()
            }
            return checkpointer.restore(folder, like)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the parameters in '{path}' cannot be read: {reason}") from None


def has_average(path: Path) -> bool:
    """Whether the checkpoint folder `path` holds averaged parameters too."""
    return (path / "ema").is_dir()


def write(path: Path, params: Params, card: dict) -> None:
    """Writes parameters and card as a new checkpoint folder, whole or not at all.

    Raises:
      UserError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"'{path}' exists already; nothing was overwritten, choose another --out")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        (partial / "card").mkdir(parents=True)
        (partial / "card" / "metadata").write_text(json.dumps(card))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "params").absolute(), params)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
