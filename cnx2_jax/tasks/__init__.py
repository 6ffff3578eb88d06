"""Tasks by name."""

from ml_collections import ConfigDict

from cnx2_jax.configuration import check_task, defaults
from cnx2_jax.tasks.base import TASKS, Task
from cnx2_jax.tasks.classify import Classify
from cnx2_jax.tasks.detect import Detect
from cnx2_jax.tasks.multilabel import Multilabel
from cnx2_jax.tasks.pretrain import Pretrain
from cnx2_jax.tasks.probe import Probe
from cnx2_jax.tasks.regress import Regress
from cnx2_jax.tasks.segment import Segment
from cnx2_jax.train.task import Data

__all__ = [
    "TASKS",
    "Classify",
    "Detect",
    "Multilabel",
    "Pretrain",
    "Probe",
    "Regress",
    "Segment",
    "Task",
    "defaults",
    "make_task",
]


def make_task(config: ConfigDict, platform: str | None = None, data: Data | None = None) -> Task:
    """Returns the task that `config.task` names, its keys and its data checked.

    Args:
      config: the run's.
      platform: what the model is built for; see `Task`.
      data: used instead of opening the config's data, and not checked; see `Task`.

    Raises:
      UserError: there is no such task; see the tasks.
    """
    check_task(config.task)
    task = TASKS[config.task](config, platform, data)
    task.check()
    if data is None:
        task.check_data()
    return task
