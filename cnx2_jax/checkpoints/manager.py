"""Saves, restores and keeps the checkpoints of one run, with Orbax."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cnx2_jax.checkpoints.metadata import METADATA_ITEM
from cnx2_jax.errors import RunError
from cnx2_jax.files import client_errors

ITEMS = ("params", "opt_state", "ema", "skipped", "variables")


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; see `metadata.is_saved` for when one is complete.

    Every process of a run creates one and calls it at the same steps; all see the same folder.

    Args:
      directory: `workdir/checkpoints`; it is created if it does not exist.
      keep: number of latest checkpoints to keep, in addition to the best one.
      best: the evaluation metric that ranks checkpoints, and whether its maximum or minimum is best.

    Raises:
      RunError: the folder cannot be created. Every method raises it on a disk error; an error after `save`
        has returned is raised by the next `save` or by `close`.
    """

    def __init__(self, directory: Path, *, keep: int, best: tuple[str, Literal["max", "min"]]):
        metric, end = best

        worst = math.inf if end == "min" else -math.inf

        def value(metrics: dict[str, float]) -> float:
            return worst if math.isnan(metrics[metric]) else metrics[metric]

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
            best_fn=value,  # the policy replaces it, but Orbax writes no metrics without it
            best_mode=end,
            cleanup_tmp_directories=True,
            step_prefix=None,
        )
        arrays = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        with self._failures():
            self._manager = ocp.CheckpointManager(
                str(directory.absolute()),
                options=options,
                item_handlers={**arrays, METADATA_ITEM: ocp.JsonCheckpointHandler()},
            )

    def reload(self) -> None:
        """Reads again which checkpoints exist."""
        self._manager.reload()

    def save(
        self, step: int, items: Mapping[str, Any], metadata: dict, metrics: dict[str, float] | None
    ) -> None:
        """Starts saving arrays by item, such as `params`; they may be donated as soon as this returns.

        A step that exists already is replaced: it was saved before it was evaluated.

        Args:
          step: the step.
          items: pytrees of arrays by name, of ITEMS.
          metadata: JSON that travels with the weights; see `metadata.make_metadata`.
          metrics: rank the best checkpoint.
        """
        arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        arguments[METADATA_ITEM] = ocp.args.JsonSave(metadata)
        with self._failures():
            if step in self._manager.all_steps():
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics)

    def items(self, step: int) -> set[str]:
        """Returns the names of the items that a step's checkpoint holds."""
        return {name for name in ITEMS if (self.directory / str(step) / name).is_dir()}

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the items named in `like` onto the shapes, dtypes and shardings given there."""
        arguments = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in like}

    def was_evaluated(self, step: int) -> bool:
        """Returns whether the checkpoint of a step was saved with metrics."""
        return step in self._manager.all_steps() and bool(self._manager.metrics(step))

    def best(self) -> Path:
        """Returns the folder of the best checkpoint, the latest of equal ones.

        That of the latest checkpoint if none was evaluated.
        """
        step = self._manager.best_step()
        return self.directory / str(self._manager.latest_step() if step is None else step)

    def close(self) -> None:
        """Waits until everything is saved; raises the errors of saving that were not raised before."""
        with self._failures():
            self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns the errors of the disk and of TensorStore into a RunError with one line."""
        disk = OSError, ValueError, RuntimeError
        expected: tuple[type[Exception], ...] = (*disk, *client_errors(self.directory))
        try:
            yield
        except expected as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].partition(" [")[0]
            raise RunError(
                f"cannot save to '{self.directory}': {reason}; checkpoints saved before are complete; when "
                "it can be written to again, the same command resumes"
            ) from error
