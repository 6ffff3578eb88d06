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


def _shuffled(places: tf.Tensor, epoch: tf.Tensor, num_records: int, seed: int) -> tf.Tensor:
    # With (seed, epoch) as the key itself, as in tf.random.experimental.index_shuffle, small sets have only
    # 256 different orders, because the cipher uses the low bits of the key. So the keys are hashed, and the
    # cipher has more than the default 4 rounds, after which neighbours are still correlated. The negative
    # numbers are free for the epochs, because positions, which seed the augmentation, are never negative.
    keys = tf.random.stateless_uniform(
        [3], tf.stack([tf.constant(seed, tf.int64), -1 - epoch]), None, None, tf.uint32
    )
    return tf.raw_ops.RandomIndexShuffle(
        index=places, seed=keys, max_index=tf.constant(num_records - 1, tf.int64), rounds=16
    )
