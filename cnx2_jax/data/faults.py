"""Records that cannot be read: whether they end the run, and which examples stand in for them."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

from cnx2_jax.cluster.store import shared_store
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError, nearest

POLICIES = ("error", "skip")

Example: TypeAlias = Callable[[tf.Tensor, tf.Tensor], Any]
StandIn: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# With half of the records unreadable, the most that is allowed, all attempts fail once in 4e9 examples.
_ATTEMPTS = 32


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What to do about records that cannot be read.

    Attributes:
      policy: "error" ends the run at the first one; "skip" puts another record in its place.
      most: with "skip", the share of all records above which the run ends.

    Raises:
      UserError: `policy` is not one of POLICIES.
    """

    policy: str
    most: float

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(
                f"unknown data.unreadable '{self.policy}'{nearest(self.policy, POLICIES)} "
                f"(known: {', '.join(POLICIES)})"
            )

    @property
    def skips(self) -> bool:
        return self.policy == "skip"


def tolerate(example: Example, position: tf.Tensor, stand_in: StandIn | None) -> tuple[Any, tf.Tensor]:
    """Makes an example, or in its place another one or a blank; in graph mode.

    Args:
      example: maps a position and the position to read from to a structure of tensors; may fail.
      position: scalar int64.
      stand_in: maps a position and the number of an attempt to the position to read from instead. None
        makes a blank example: zeros, and nothing along the axes of unknown length.

    Returns:
      The example, and a scalar bool: whether another one stands in for it.

    Raises:
      tf.errors.OpError: when it runs, if all stand-ins fail too.
    """

    # A dataset of one element, because nothing else in a graph can continue after an error.
    @tf.autograph.experimental.do_not_convert
    def attempted(attempt: tf.Tensor) -> tuple[Any, tf.Tensor]:
        read_from = stand_in(position, attempt) if stand_in else position
        return example(position, read_from), attempt > 0

    attempts = tf.data.Dataset.range(_ATTEMPTS if stand_in else 1).map(attempted).ignore_errors()
    if stand_in is None:
        blank = tf.nest.map_structure(_zeros, attempts.element_spec[0])
        attempts = attempts.concatenate(tf.data.Dataset.from_tensors((blank, tf.constant(True))))
    return attempts.take(1).get_single_element()


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    return tf.zeros([side or 0 for side in spec.shape], spec.dtype)


class Skipped:
    """The records of a source that could not be read, as far as any process of the run has met them.

    Args:
      source: a name of the source, the same in all processes.
    """

    def __init__(self, source: str):
        self._local: set[int] = set()
        self._folder = f"cnx2/unreadable/{zlib.crc32(source.encode())}"

    def add(self, record: int) -> bool:
        """Adds a record; returns whether it is new to this process."""
        if record in self._local:
            return False
        self._local.add(record)
        store = shared_store()
        if store is not None:
            store.key_value_set(f"{self._folder}/{record}", "", allow_overwrite=True)
        return True

    def __len__(self) -> int:
        store = shared_store()
        return len(self._local) if store is None else len(store.key_value_dir_get(self._folder))
