"""Tasks by name."""

from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.tasks.classify import Classify
from cnx2_jax.tasks.pretrain import Pretrain
from cnx2_jax.tasks.probe import Probe

TASKS: dict[str, type[Pretrain] | type[Classify]] = {
    "pretrain": Pretrain,
    "classify": Classify,
    "probe": Probe,
}


def make_task(config: ConfigDict, platform: str | None = None) -> Pretrain | Classify:
    """Returns the task that `config.task` names, with its data opened.

    Args:
      config: the run's.
      platform: what the model is built for; see `models.build`.

    Raises:
      UserError: there is no such task; see the tasks.
    """
    if config.task not in TASKS:
        raise UserError(
            f"unknown task '{config.task}'{nearest(config.task, TASKS)} (known: {', '.join(TASKS)})"
        )
    return TASKS[config.task](config, platform)
