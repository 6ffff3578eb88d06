"""Statistics of a data set, and checks that its training order keeps its promises."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from cnx2_jax.data.order import epoch_order
from cnx2_jax.data.pipeline import PREFETCHED_BATCHES, Batch
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf

# Opens the training stream of a small batch: (first step, host, number of hosts) -> batches.
Stream = Callable[[int, int, int], Iterator[Batch]]

_HOST_COUNTS = (2, 4, 8)
_FAR_STEP = 1_000_000


def class_counts(source: Source) -> np.ndarray | None:
    """Counts the records of each class, int64 [classes]; None if labels are only known by reading."""
    if "labels" in source.fields:
        return source.targets["labels"].sum(axis=0).astype(np.int64)
    if source.labels is None or not source.class_names:
        return None
    return np.bincount(source.labels, minlength=len(source.class_names))


def order_checks(num_records: int, seed: int, stream: Stream, *, epochs: bool = True) -> dict[str, bool]:
    """Checks the training order on the data itself.

    Args:
      num_records: of an epoch.
      seed: of the run.
      stream: opens the training stream, in batches that divide over 8 hosts.
      epochs: whether the order has epochs, which visit every record once; balanced sampling has none.

    Returns:
      Whether each check holds, by a sentence that states it.
    """
    checks = _epoch_checks(num_records, seed) if epochs else {}
    first = stream(0, 0, 1)
    batches = [next(first) for _ in range(3)]
    resumed = _same(next(stream(2, 0, 1)), batches[2])
    partitioned, whole = True, next(stream(_FAR_STEP, 0, 1))
    for hosts in _HOST_COUNTS:
        shares = [next(stream(_FAR_STEP, host, hosts)) for host in range(hosts)]
        joined = tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *shares)
        partitioned &= _same(joined, whole)
    return checks | {
        "starting at step 2 gives the batch that steps 0 and 1 lead to": resumed,
        f"2, 4 and 8 hosts make the batch of one, at step {_FAR_STEP:,}": partitioned,
    }


def _epoch_checks(num_records: int, seed: int) -> dict[str, bool]:
    one, two = (epoch_order(epoch, num_records, seed) for epoch in (0, 1))
    everything = np.arange(num_records)
    permuted = np.array_equal(np.sort(one), everything) and np.array_equal(np.sort(two), everything)
    differ = num_records < 4 or not np.array_equal(one, two)
    return {"each epoch visits every record once": permuted, "epochs differ in order": differ}


def images_per_second(batches: Iterator[Batch], seconds: float) -> float:
    """Measures a stream for about `seconds`, after its start and the batches that it had prefetched."""
    for _ in range(PREFETCHED_BATCHES + 2):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        count += len(next(batches)["image"])
    return count / (time.perf_counter() - start)


def _same(one: Batch, other: Batch) -> bool:
    return all(map(np.array_equal, tf.nest.flatten(one), tf.nest.flatten(other)))
