"""Balanced sampling: every class has its turn equally often, as a function of the position."""

import numpy as np
import pytest

from cnx2_jax.data.order import Balanced
from cnx2_jax.data.tensorflow import tf

LABELS = np.array([0, 3, 0, 0, 1, 0, 3, 0, 0, 1, 0, 0])  # no record of class 2


def records(count, seed=0, labels=LABELS):
    order = Balanced(labels, seed)
    positions = tf.data.Dataset.range(count).map(order.record_at)
    return np.fromiter(positions.as_numpy_iterator(), np.int64)


def test_every_block_holds_every_class_and_every_class_its_records_in_turn():
    found = records(3 * 48).reshape(-1, 3)
    blocks = LABELS[found]
    np.testing.assert_array_equal(np.sort(blocks, axis=1), np.tile([0, 1, 3], (48, 1)))
    assert len(np.unique(blocks, axis=0)) > 3  # in random order
    for label in (0, 1, 3):
        own = np.flatnonzero(label == LABELS)
        turns = found[blocks == label].reshape(-1, len(own))
        np.testing.assert_array_equal(np.sort(turns, axis=1), np.tile(own, (len(turns), 1)))
        assert len(np.unique(turns, axis=0)) > 1


def test_the_order_depends_on_the_seed_and_the_position_alone():
    one = records(60)
    order = Balanced(LABELS, 0)
    assert [int(order.record_at(tf.constant(place, tf.int64))) for place in (59, 7)] == [one[59], one[7]]
    assert not np.array_equal(one, records(60, seed=1))


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1]])
def test_few_records(labels):
    found = records(12, labels=np.array(labels))
    assert set(found) == set(range(len(labels)))
