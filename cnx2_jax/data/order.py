"""The order of training: which record is at which position, a new permutation every epoch."""

import numpy as np

from cnx2_jax.data.tensorflow import tf


def shuffled_record(position: tf.Tensor, num_records: int, seed: int) -> tf.Tensor:
    """Returns the index of the record at a position of the training stream, both scalar int64."""
    epoch, place = position // num_records, position % num_records
    return _shuffled(place, epoch, num_records, seed)


def epoch_order(epoch: int, num_records: int, seed: int) -> np.ndarray:
    """Returns the records of one epoch in their order, int64 [num_records]."""
    places, epoch = tf.range(num_records, dtype=tf.int64), tf.constant(epoch, tf.int64)
    return _shuffled(places, epoch, num_records, seed).numpy()


class Balanced:
    """An order in which every class that occurs has its turn equally often.

    Of C such classes, each block of C positions holds one record of every class, in random order. A class's
    records take turns too: each comes once before any comes again.

    Args:
      labels: int [num_records], the class of each record.
      seed: of the run.
    """

    def __init__(self, labels: np.ndarray, seed: int):
        self.seed = seed
        counts = np.bincount(labels)
        self.counts = counts[counts > 0]
        starts = np.cumsum(self.counts) - self.counts
        # The records of all classes, one class after another.
        self._records, self._counts, self._starts = (
            tf.constant(each, tf.int64) for each in (np.argsort(labels, kind="stable"), self.counts, starts)
        )

    def record_at(self, position: tf.Tensor) -> tf.Tensor:
        """Returns the index of the record at a position of the training stream, both scalar int64."""
        classes = len(self.counts)
        block, turn = position // classes, position % classes
        # Even numbers draw the order of classes, odd ones that of a class's records.
        label = _shuffled(turn, 2 * block, classes, self.seed)
        count = self._counts[label]
        time, place = block // count, block % count
        chosen = _shuffled(place, 2 * (time * classes + label) + 1, count, self.seed)
        return self._records[self._starts[label] + chosen]


def _shuffled(places: tf.Tensor, epoch: tf.Tensor, num_records: int | tf.Tensor, seed: int) -> tf.Tensor:
    # With (seed, epoch) as the key itself, as in tf.random.experimental.index_shuffle, small sets have only
    # 256 different orders, because the cipher uses the low bits of the key. So the keys are hashed, and the
    # cipher has more than the default 4 rounds, after which neighbours are still correlated. The negative
    # numbers are free for the epochs, because positions, which seed the augmentation, are never negative.
    keys = tf.random.stateless_uniform(
        [3], tf.stack([tf.constant(seed, tf.int64), -1 - epoch]), None, None, tf.uint32
    )
    return tf.raw_ops.RandomIndexShuffle(
        index=places, seed=keys, max_index=tf.cast(num_records - 1, tf.int64), rounds=16
    )
