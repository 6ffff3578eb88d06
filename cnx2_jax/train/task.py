"""The interface that the loop uses; `tasks.base.Task` implements it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.models.state import Params
from cnx2_jax.train.terms import Terms
from cnx2_jax.types import Batch, HostBatch, Metrics

AVERAGED = "ema_"  # before the metrics of averaged parameters


Best = tuple[str, Literal["max", "min"]]


def ranked_by(best: Best, config: ConfigDict) -> Best:
    """Returns the metric that decides between evaluations, and whether its maximum or minimum is best.

    Args:
      best: the task's; see `tasks.base.Task.best`.
      config: if it keeps averaged parameters, their metric decides.
    """
    name, end = best
    return (AVERAGED + name if config.ema_decay else name), end


class Data(Protocol):
    """Where a task's batches come from. A batch is a dict of arrays with the sample as first axis."""

    @property
    def num_train(self) -> int:
        """How many images an epoch has."""
        ...

    @property
    def num_val(self) -> int:
        """How many images an evaluation has."""
        ...

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[HostBatch]:
        """Yields this host's share of the global batches of steps `start_step`, `start_step + 1`, ..."""
        ...

    def eval_batches(self, *, process_index: int = 0, process_count: int = 1) -> Iterable[HostBatch]:
        """Yields this host's share of one pass; `mask` is False on padding."""
        ...


class Task(Protocol):
    """A model, its loss and its evaluation; see `tasks.base.Task` for what each part is."""

    @property
    def config(self) -> ConfigDict: ...

    @property
    def data(self) -> Data: ...

    @property
    def best(self) -> Best: ...

    def init(self, rngs: nnx.Rngs) -> nnx.Module: ...

    def start(self, arrays: Params) -> Params: ...

    def begin(self, arrays: Params) -> None: ...

    def adopt(self, metadata: Mapping[str, Any]) -> None: ...

    def prepare(self, batch: Batch, key: jax.Array) -> Batch: ...

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]: ...

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> Metrics: ...

    def pictures(self, model: Any) -> dict[str, np.ndarray]: ...

    def metadata(self) -> dict: ...
