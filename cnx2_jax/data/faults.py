"""What becomes of an image that cannot be read, and of the batch it was for."""

import zlib
from collections.abc import Callable

from cnx2_jax.cluster.store import shared_store
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError, nearest

POLICIES = ("error", "skip")

Example = Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]
StandIn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# With every second image unreadable, which is the most allowed, all of them fail once in 4e9 images.
_ATTEMPTS = 32


def check(policy: str) -> None:
    """Raises UserError unless `data.unreadable` is one of POLICIES."""
    if policy not in POLICIES:
        raise UserError(
            f"unknown data.unreadable '{policy}'{nearest(policy, POLICIES)} (known: {', '.join(POLICIES)})"
        )


def tolerate(example: Example, position: tf.Tensor, stand_in: StandIn | None) -> dict[str, tf.Tensor]:
    """Makes an example, or in its place another one or a blank; in graph mode.

    Args:
      example: (position, position to read from) -> {"image": ..., "label": ...}, which may fail.
      position: scalar int64.
      stand_in: (position, attempt) -> the position to read from instead; None: a blank image, label 0.

    Returns:
      The example with "unreadable" added, scalar bool: whether it is not the one asked for.

    Raises:
      tf.errors.OpError: when it runs, if all stand-ins fail too.
    """

    # A data set of one element, as nothing else in a graph can go on after an error.
    @tf.autograph.experimental.do_not_convert
    def attempted(attempt: tf.Tensor) -> dict[str, tf.Tensor]:
        read_from = stand_in(position, attempt) if stand_in else position
        return {**example(position, read_from), "unreadable": attempt > 0}

    attempts = tf.data.Dataset.range(_ATTEMPTS if stand_in else 1).map(attempted).ignore_errors()
    if stand_in is None:
        shapes = attempts.element_spec
        blank = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
        blank["unreadable"] = tf.constant(True)
        attempts = attempts.concatenate(tf.data.Dataset.from_tensors(blank))
    return attempts.take(1).get_single_element()


class Skipped:
    """The records of a source that could not be read, as far as any process of the run has met them.

    Args:
      source: a name of the source, the same in all processes.
    """

    def __init__(self, source: str):
        self._here: set[int] = set()
        self._place = f"cnx2/unreadable/{zlib.crc32(source.encode())}"

    def add(self, record: int) -> bool:
        """Takes in a record; says whether this process has not met it before."""
        if record in self._here:
            return False
        self._here.add(record)
        store = shared_store()
        if store is not None:
            store.key_value_set(f"{self._place}/{record}", "", allow_overwrite=True)
        return True

    def __len__(self) -> int:
        store = shared_store()
        return len(self._here) if store is None else len(store.key_value_dir_get(self._place))
