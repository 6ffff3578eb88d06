"""From records to batches: order, reading, faults and batching, resumable at any step.

The training stream is endless and each of its examples has a number, its position: example i of global
batch s is at position s * batch_size + i. Which record is read there and how it is transformed is a function
of (seed, position) alone, so a run can enter the stream at any step, on any number of hosts.
"""

import atexit
import contextlib
import copy
import dataclasses
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import numpy as np
from tqdm import tqdm

from cnx2_jax.data import faults
from cnx2_jax.data.fields import Entries, Entry, Field
from cnx2_jax.data.order import shuffled_record
from cnx2_jax.data.refusals import refusal
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import Transform
from cnx2_jax.errors import UserError

# NumPy arrays by name; those that must stay on the host in a dictionary under `types.HOST`.
Batch: TypeAlias = dict[str, Any]
T = TypeVar("T", bound="Examples")

PREFETCHED_BATCHES = 2
# TensorFlow quotes names and contents in its messages; if they are not text, its own error is lost.
FAILURES = (tf.errors.OpError, UnicodeDecodeError)
_END_OF_STREAM = 2**62

_streams: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Ends reading while Python still runs: a thread that decodes masks in Python would hang its exit."""
    for stream in list(_streams):
        with contextlib.suppress(ValueError):  # it is running, in another thread
            stream.close()


@dataclasses.dataclass(eq=False)
class Examples:
    """The examples of one run, training and validation, as batches of NumPy arrays.

    Attributes:
      train, val: the records of both splits.
      train_transform, eval_transform: make examples of the records of `train` and of `val`.
      seed: of the run; decides the order of training and all random changes.
      batch_size: of the global batch.
      tolerance: what to do about records that cannot be read.
      record_at: maps a position of the training stream to the index of its record, both scalar int64; by
        default every epoch visits each record once.
    """

    train: Source
    val: Source
    train_transform: Transform
    eval_transform: Transform
    seed: int
    batch_size: int
    tolerance: faults.Tolerance

    def __post_init__(self) -> None:
        # Traced once, for however many streams are opened: every evaluation opens one.
        self.train_transform = _Traced(self.train_transform)
        self.eval_transform = _Traced(self.eval_transform)
        self.record_at: Callable[[tf.Tensor], tf.Tensor] = lambda position: shuffled_record(
            position, self.num_train, self.seed
        )

    @property
    def num_train(self) -> int:
        return self.train.num_records

    @property
    def num_val(self) -> int:
        return self.val.num_records

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty when the examples have none."""
        return self.train.class_names

    def of_batch(self: T, batch_size: int) -> T:
        """Returns the same examples in batches of another size."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Yields the global batches from `start_step` on, without end: this host's slice of each.

        Records come in the order of `record_at`; a batch may span two epochs.

        Returns:
          An iterator over the arrays of `train_transform`, stacked to [b, ...], where b is
          `batch_size / process_count` and host 0 has the first b examples of the global batch. When
          unreadable records are skipped, also "unreadable": bool [b], true where another record, which
          depends on the position alone, stands in for one that cannot be read.

        Raises:
          UserError: at once if the batch does not divide over the hosts; from the iterator at the batch
            that holds an unreadable record or, if these are skipped, once the hosts have met more than
            the tolerated share of them.
        """
        return _stream(
            self.train,
            self.train_transform,
            self.tolerance,
            self.seed,
            self.record_at,
            steps=(start_step, _END_OF_STREAM // self.batch_size),
            positions=_Positions(self.batch_size, process_index, process_count),
            # In a later epoch another record is at the same place.
            stand_in=lambda position, attempt: position + attempt * self.num_train,
        )

    def eval_batches(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yields the validation examples once: see `one_pass`."""
        return one_pass(
            self.val,
            self.eval_transform,
            batch_size=self.batch_size,
            tolerance=self.tolerance,
            process_index=process_index,
            process_count=process_count,
        )


def one_pass(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    tolerance: faults.Tolerance,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields the examples of a source once, in their order: this host's slice of each global batch.

    Every host gets the same number of batches. Beyond the end of the source the last example is repeated
    with "mask" false, so over all hosts each example appears once with mask true.

    Returns:
      An iterator over batches as in `Examples.train_batches`, with "mask": bool [b] added, which is false
      for unreadable records too.

    Raises:
      UserError: as `Examples.train_batches`.
    """
    positions = _Positions(batch_size, process_index, process_count)
    last = source.num_records - 1
    batches = _stream(
        source,
        transform,
        tolerance,
        0,
        lambda position: tf.minimum(position, last),
        steps=(0, -(-source.num_records // batch_size)),
        positions=positions,
        stand_in=None,
    )
    for step, batch in enumerate(batches):
        real = positions.at_step(step) <= last
        if "unreadable" not in batch:
            yield {**batch, "mask": real}
        else:
            bad = batch["unreadable"] & real  # padding repeats an unreadable record but is not another one
            yield {**batch, "unreadable": bad, "mask": real & ~bad}


def usable_cores() -> int:
    """Returns how many cores this process may use; a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Traced:
    """A transform whose two parts are traced once."""

    def __init__(self, transform: Transform):
        self.decode = tf.function(transform.decode, autograph=False)
        self.finish = tf.function(transform.finish, autograph=False)


class _Positions:
    """Which positions of the global stream belong to one host: a contiguous slice of each batch."""

    def __init__(self, batch_size: int, process_index: int, process_count: int):
        if batch_size % process_count:
            raise UserError(
                f"batch_size {batch_size} does not divide over {process_count} hosts; "
                f"use a multiple of {process_count}"
            )
        self.batch_size = batch_size
        self.per_host = batch_size // process_count
        self._offset = process_index * self.per_host

    @tf.autograph.experimental.do_not_convert
    def at(self, index: tf.Tensor) -> tf.Tensor:
        """Returns the position of this host's example number `index`, counted from step 0."""
        step, place = index // self.per_host, index % self.per_host
        return step * self.batch_size + self._offset + place

    def at_step(self, step: int) -> np.ndarray:
        """Returns the positions of this host's examples at one step, int64 [per_host]."""
        return step * self.batch_size + self._offset + np.arange(self.per_host)


def _stream(
    source: Source,
    transform: Transform,
    tolerance: faults.Tolerance,
    seed: int,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    *,
    steps: tuple[int, int],
    positions: _Positions,
    stand_in: faults.StandIn | None,
) -> Iterator[Batch]:
    """Yields the batches of `range(*steps)`, the host's share of each.

    `record_at` maps a position to the index of a record.
    """

    def seed_at(position: tf.Tensor) -> tf.Tensor:
        return tf.stack([tf.constant(seed, tf.int64), position])

    # No Python control flow here depends on a tensor, and converting it would add seconds to every start.
    @tf.autograph.experimental.do_not_convert
    def decoded(position: tf.Tensor, read_from: tf.Tensor) -> Entries:
        return transform.decode(source.read(record_at(read_from)), seed_at(position))

    @tf.autograph.experimental.do_not_convert
    def example(position: tf.Tensor) -> dict[str, Any]:
        if not tolerance.skips:
            return transform.finish(decoded(position, position), seed_at(position))
        values, unreadable = faults.tolerate(decoded, position, stand_in)
        return {**transform.finish(values, seed_at(position)), "unreadable": unreadable}

    threads = usable_cores()
    first, last = steps
    dataset = tf.data.Dataset.range(first * positions.per_host, last * positions.per_host)
    dataset = dataset.map(positions.at).map(example, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(positions.per_host, drop_remainder=True).prefetch(PREFETCHED_BATCHES)
    options = tf.data.Options()
    # Fixed widths, because the buffers of autotuning grow until the host's memory is full.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    batches = _guarded(dataset.with_options(options), source, record_at, decoded, first, positions)
    _streams.add(batches)
    if not tolerance.skips:
        return batches
    return _counted(batches, source, tolerance.most, record_at, first, positions)


def _guarded(
    dataset: tf.data.Dataset,
    source: Source,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    decoded: faults.Example,
    first_step: int,
    positions: _Positions,
) -> Iterator[Batch]:
    """Iterates; when a batch fails, decodes its records one by one to name the one at fault."""
    step = first_step
    iterator = dataset.as_numpy_iterator()  # its threads end when this generator does
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except FAILURES:
            for position in tf.constant(positions.at_step(step), tf.int64):
                try:
                    decoded(position, position)
                except FAILURES as error:
                    raise _blamed(source, int(record_at(position)), error) from error
            raise  # All records can be read now, so the failure was not theirs: show TensorFlow's error.
        yield batch
        step += 1


def _counted(
    batches: Iterator[Batch],
    source: Source,
    share: float,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    first_step: int,
    positions: _Positions,
) -> Iterator[Batch]:
    """Names each record that was skipped, once, and stops when they are more than `share` of all."""
    skipped = faults.Skipped(f"{source.describe(0)} of {source.num_records}")
    for step, batch in enumerate(batches, first_step):
        for position in positions.at_step(step)[batch["unreadable"]]:
            record = int(record_at(tf.constant(position, tf.int64)))
            if not skipped.add(record):
                continue
            tqdm.write(f"skipped: image '{source.describe(record)}' cannot be read", file=sys.stderr)
            if len(skipped) > share * source.num_records:
                raise UserError(
                    f"{len(skipped)} of {source.num_records} images cannot be read, the last "
                    f"'{source.describe(record)}': more than data.max_unreadable {share}; repair or remove "
                    "them, or raise data.max_unreadable"
                )
        yield batch


def _blamed(source: Source, index: int, error: Exception) -> UserError:
    """Returns the UserError for a record that failed with `error`; names the first entry that fails alone."""
    for name, field in source.fields.items():

        def decoded(name: str = name, field: Field = field) -> Entry:
            return field.decode(source.read(tf.constant(index, tf.int64))[name])

        try:
            # A graph runs only what this entry needs; eager code would read all files of the record.
            tf.function(decoded, autograph=False)()
        except FAILURES as failure:
            return unreadable(source.name_of(index, name), failure, field)
    return unreadable(source.describe(index), error, next(iter(source.fields.values())))


def unreadable(name: str, error: Exception, field: Field) -> UserError:
    """Returns the UserError for the entry called `name` whose reading or decoding failed with `error`."""
    entry = f"{field.noun} '{name}'"
    if isinstance(error, tf.errors.NotFoundError):
        return UserError(f"{entry} does not exist; check the path or restore it")
    if isinstance(error, tf.errors.PermissionDeniedError):
        return UserError(f"{entry} may not be read; change its permissions")
    if reason := refusal(error):
        return UserError(f"{entry} {reason}")
    return UserError(f"{entry} is not {field.readable}: repair or remove it")
