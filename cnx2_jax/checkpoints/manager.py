"""The checkpoints of one run: saved, restored and kept, by Orbax."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cnx2_jax.errors import RunError

ITEMS = ("params", "opt_state", "ema", "skipped", "variables")


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
        arrays = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        with self._failures():
            self._manager = ocp.CheckpointManager(
                directory.absolute(),
                options=options,
                item_handlers={**arrays, "card": ocp.JsonCheckpointHandler()},
            )

    def reload(self) -> None:
        """Looks again at which checkpoints there are."""
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
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._failures():
            if step in self._manager.all_steps():
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.save(
                step, args=ocp.args.Composite(card=ocp.args.JsonSave(metadata), **arguments), metrics=metrics
            )

    def items(self, step: int) -> set[str]:
        """Returns the names of the items that a step's checkpoint holds."""
        return {name for name in ITEMS if (self.directory / str(step) / name).is_dir()}

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the items named in `like` onto the shapes, dtypes and shardings given there."""
        arguments = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: restored[name] for name in like}

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
