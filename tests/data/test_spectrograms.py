"""SpecAugment: bars of the mean, uniform in width and place, functions of the seed and the position."""

import numpy as np
import pytest

from cnx2_jax.data.spectrograms import SpecAugment, make_spec_augment, refuse_spec_augment
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults


def masked(masks, image, count=400):
    """`count` images, of as many seeds."""

    def make(index):
        draws = tf.random.stateless_uniform([masks.draws], tf.stack([tf.constant(4, tf.int64), index]))
        return masks.apply(image, draws)

    return np.stack(list(tf.data.Dataset.range(count).map(make).as_numpy_iterator()))


def test_a_time_mask_is_a_bar_of_columns_uniform_in_width_and_place():
    image = tf.ones([6, 20, 2])
    images = masked(SpecAugment(1, 5, 0, 0, (0.25, -3.0)), image)
    hidden = images[..., 0] == 0.25
    np.testing.assert_array_equal(images[..., 1] == -3, hidden)
    np.testing.assert_array_equal(images[~hidden], 1)
    np.testing.assert_array_equal(hidden, hidden[:, :1].repeat(6, axis=1))
    columns = hidden[:, 0]
    widths = columns.sum(axis=1)
    assert (np.diff(columns.astype(int), axis=1) == 1).sum(axis=1).max() <= 1  # one bar each
    # A sixth of 400 masks have each width, and every column is as often covered as its mirror image.
    assert np.bincount(widths, minlength=6).min() > 35 and widths.max() == 5
    covered = columns.mean(axis=0)
    assert np.abs(covered - covered[::-1]).max() < 0.1 and covered.min() > 0


def test_frequency_masks_cover_rows_and_several_masks_overlap():
    images = masked(SpecAugment(2, 3, 2, 4, (0.0,)), tf.ones([16, 12, 1]))[..., 0]
    rows, columns = (images == 0).all(axis=2), (images == 0).all(axis=1)
    np.testing.assert_array_equal(images == 0, rows[:, :, None] | columns[:, None])
    assert rows.sum(axis=1).max() > 4 and columns.sum(axis=1).max() > 3  # two beside each other
    assert rows.sum(axis=1).max() <= 8 and columns.sum(axis=1).max() <= 6


@pytest.mark.parametrize(
    ("dtype", "fill"), [("uint8", 31), ("uint16", 40000), ("int16", -7), ("float16", 0.5)]
)
def test_every_dtype_keeps_its_unit(dtype, fill):
    config = defaults("classify")
    config.update({"image_size": (8, 10)})
    mean = fill / 255 if dtype == "uint8" else fill
    config.data.update({"time_masks": 3, "time_mask_width": 9, "dtype": dtype, "mean": (mean,)})
    images = masked(make_spec_augment(config), tf.ones([8, 10, 1], dtype), count=8)
    assert images.dtype == dtype and set(np.unique(images)) == {1, np.dtype(dtype).type(fill)}


def test_masks_without_meaning_are_refused_in_one_line():
    config = defaults("classify")
    config.update({"image_size": (8, 10)})
    assert make_spec_augment(config) is None
    config.data.frequency_masks = 1
    with pytest.raises(UserError, match="frequency_mask_width 0 must be from 1 to 7"):
        make_spec_augment(config)
    config.data.frequency_mask_width = 8
    with pytest.raises(UserError, match="frequency_mask_width 8 must be from 1 to 7"):
        make_spec_augment(config)
    with pytest.raises(UserError, match=r"data.frequency_masks 1 .* not for the task classify"):
        refuse_spec_augment(config)
