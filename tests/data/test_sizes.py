"""Sizes of images, and the sizes that they are resized to, by mmcv's rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnx2_jax.data.sizes import canvas, fitted, image_sizes
from cnx2_jax.data.sources.folder import open_whole_folder
from cnx2_jax.data.tensorflow import tf


def rescaled(height, width, long, short):
    """mmcv's rescale_size for a pair of bounds, by its definition."""
    factor = min(max(long, short) / max(height, width), min(long, short) / min(height, width))
    return [int(height * factor + 0.5), int(width * factor + 0.5)]


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    short=st.integers(1, 1000),
    more=st.integers(0, 3000),
)
def test_fitted_is_mmcvs_rule(size, short, more):
    expected = rescaled(*size, short + more, short)
    np.testing.assert_array_equal(fitted(tf.constant(size), short + more, short), np.maximum(expected, 1))


def test_fitted_takes_many_sizes():
    sizes = tf.constant([[427, 640], [640, 427], [100, 1000]])
    np.testing.assert_array_equal(fitted(sizes, 2048, 512), [[512, 767], [767, 512], [205, 2048]])
    assert fitted(tf.zeros([0, 2], tf.int32), 2048, 512).shape == (0, 2)


def test_all_sizes_fit_into_a_canvas():
    assert canvas(np.array([[10, 65], [33, 64]]), 32) == (64, 96)
    assert canvas(np.array([[10, 65], [33, 64]])) == (33, 65)
    assert canvas(np.zeros((0, 2), np.int32), 32) == (32, 32)


def test_unreadable_images_have_no_size(tmp_path):
    for index in range(4):
        Image.new("RGB", (9, 8)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"")
    source = open_whole_folder(str(tmp_path))
    np.testing.assert_array_equal(image_sizes(source, 10), [[8, 9]] * 3)
    np.testing.assert_array_equal(image_sizes(source), [[8, 9]] * 3)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_sizes_are_those_of_upright_images_in_their_order(tmp_path, kind):
    for index in range(5):
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 3 and kind == "jpg" else 1
        Image.new("RGB", (9, 20 + index)).save(tmp_path / f"{index}.{kind}", exif=exif)
    expected = [[20, 9], [21, 9], [22, 9], [9, 23] if kind == "jpg" else [23, 9], [24, 9]]
    np.testing.assert_array_equal(image_sizes(open_whole_folder(str(tmp_path))), expected)
