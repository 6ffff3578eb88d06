"""What the loop asks of a task. A new task is one new file that provides this."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.types import Batch, Metrics


class Data(Protocol):
    """Where a task's batches come from. A batch is a dict of arrays with the batch as first axis."""

    @property
    def num_train(self) -> int:
        """How many images an epoch has."""
        ...

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's share of the global batches of steps `start_step`, `start_step + 1`, ..."""
        ...

    def eval_batches(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[dict[str, np.ndarray]]:
        """Yields this host's share of one pass; `mask` is False on padding."""
        ...


class Task(Protocol):
    """A model, its loss and its evaluation."""

    @property
    def config(self) -> ConfigDict:
        """The run's."""
        ...

    @property
    def data(self) -> Data:
        """Its batches."""
        ...

    @property
    def best(self) -> tuple[str, Literal["max", "min"]]:
        """The evaluation metric by which checkpoints are ranked, and which end of it is good."""
        ...

    def init(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the model with fresh weights; traced, so that each device makes only its share."""
        ...

    def start(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the parameters that step 0 begins with, given the fresh ones."""
        ...

    def begin(self, params: dict[str, jax.Array]) -> None:
        """Is told what the run goes on with, fresh or restored, before any batch is asked for."""
        ...

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns a global batch as `loss` wants it: here is what happens between its samples.

        `key` is a function of the seed and the step. Traced, and not differentiated.
        """
        ...

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean loss of a batch, and metrics that are means over the batch too.

        `keys` holds one random key per sample, a function of the seed, the step and the sample's position
        in the global batch: draw from nothing else.
        """
        ...

    def evaluate(self, model: Any, batches: Iterable[Batch]) -> Metrics:
        """Returns metrics over one pass of padded batches."""
        ...

    def pictures(self, model: Any) -> dict[str, np.ndarray]:
        """Returns named uint8 images `[H, W, 3]` that show how the model does; often none."""
        ...

    def card(self) -> dict:
        """Returns what a user of the weights must know, as JSON: it travels in every checkpoint."""
        ...
