"""Orbax checkpoints: save, restore, and find the parameters in what a user points at.

A run's checkpoint is a folder `checkpoints/STEP` with `params` (arrays by dotted name), `card` (JSON: what
a user of the parameters must know), `opt_state` and, where the run keeps them, `ema`, the average of its
parameters, and `skipped`, how many updates it left out.
An exported checkpoint has `params` and `card` alone, so one reader serves both.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import check_new, creating
from cnx2_jax.models.state import Params
from cnx2_jax.train.state import TrainState

FOREIGN = (".pt", ".pth", ".bin", ".safetensors")  # files that `cnx2 convert` reads


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous, and a folder appears only when it is whole.

    Every process of a run makes one and calls it at the same steps; all see the same folder.

    Args:
      directory: `workdir/checkpoints`, created if need be.
      keep: how many of the latest to keep; the best by `best` is kept besides.
      best: evaluation metric and the end of it that is good.

    Raises:
      RunError: the folder cannot be made. So does each method where what it does fails on the disk; what
        fails after `save` has returned is raised by the next `save` or by `close`.
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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=value,  # unused beside the policy, but without it metrics are not written
            best_mode=end,
            cleanup_tmp_directories=True,
            step_prefix=None,
        )
        arrays = {name: ocp.StandardCheckpointHandler() for name in ("params", "opt_state", "ema", "skipped")}
        with self._failures():
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                options=options,
                item_handlers={**arrays, "card": ocp.JsonCheckpointHandler()},
            )

    def reload(self) -> None:
        """Looks again at which checkpoints there are."""
        self._manager.reload()

    def save(self, step: int, state: TrainState, card: dict, metrics: dict[str, float] | None) -> None:
        """Begins to save; the arrays may be donated as soon as this returns. `metrics` rank the best.

        A step that is there already is replaced: it was saved before it was evaluated.
        """
        items = {name: ocp.args.StandardSave(item) for name, item in saved_items(state).items()}
        with self._failures():
            if step in self._manager.all_steps():
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(
                step, args=ocp.args.Composite(card=ocp.args.JsonSave(card), **items), metrics=metrics
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a step onto the shapes, dtypes and shardings of `like`."""
        wanted = saved_items(like)
        if not (self.directory / str(step) / "skipped").is_dir():
            wanted.pop("skipped", None)  # the run went on until then without leaving anything out
        arguments = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
        items = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        count = jax.device_put(np.int32(step), like.step.sharding)
        skipped = like.skipped and (
            items.get("skipped")
            or {name: jax.device_put(np.int32(0), leaf.sharding) for name, leaf in like.skipped.items()}
        )
        return TrainState(count, items["params"], items["opt_state"], items.get("ema"), skipped)

    def best(self) -> Path:
        """Returns the folder of the best checkpoint; the latest where none was evaluated."""
        return self.directory / str(self._manager.best_step())

    def close(self) -> None:
        """Waits for what is being saved; an error in saving is raised here at the latest."""
        with self._failures():
            self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Makes one line of what goes wrong on the disk, and of what TensorStore calls it."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].partition(" [")[0]
            raise RunError(
                f"cannot save to '{self.directory}': {reason}; checkpoints saved before are whole, make room "
                "and give the same command"
            ) from error


def saved_items(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint holds of a state besides its step, by name."""
    items = {
        "params": state.params,
        "opt_state": state.opt_state,
        "ema": state.ema,
        "skipped": state.skipped,
    }
    return {name: item for name, item in items.items() if item is not None}


def find(path: Path) -> Path:
    """Returns the folder with `params` and `card` that `path` means.

    Args:
      path: `checkpoints/STEP` of a run, a workdir (its latest), or an exported checkpoint.

    Raises:
      UserError: there is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist")
    if path.suffix in FOREIGN or (path / "model.safetensors").exists():
        raise UserError(f"'{path}' holds another library's weights; `cnx2 convert` makes them a checkpoint")
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
        raise UserError(f"the parameters in '{path}' cannot be read: {reason}{_others(path)}") from None


def _others(path: Path) -> str:
    """Says which other steps of the run there are, if `path` is one of a run's."""
    steps = sorted(int(p.name) for p in path.parent.glob("*") if p.name.isdigit() and p.name != path.name)
    return f"; give another one, {path.parent / str(steps[-1])}" if path.name.isdigit() and steps else ""


def has_average(path: Path) -> bool:
    """Whether the checkpoint folder `path` holds averaged parameters too."""
    return (path / "ema").is_dir()


def write(path: Path, params: Params, card: dict) -> None:
    """Writes parameters and card as a new checkpoint folder, whole or not at all.

    Raises:
      UserError: something is there already, or it cannot be written.
    """
    check_new(path, "--out")
    with creating(path) as partial:
        (partial / "card").mkdir(parents=True)
        (partial / "card" / "metadata").write_text(json.dumps(card))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "params").absolute(), params)
