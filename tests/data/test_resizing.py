"""Resizing against Pillow, on a photograph and on noise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnx2_jax.data.resizing import BILINEAR, resize, resize_nearest
from cnx2_jax.data.tensorflow import tf

BICUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize("size", [(112, 160), (64, 64), (300, 90), (853, 1000), (200, 900), (427, 640)])
def test_photograph(photo, size):
    resized = resize(np.asarray(photo), size).numpy()
    expected = np.asarray(photo.resize(size[::-1], BICUBIC))
    assert resized.dtype == np.uint8 and resized.shape == expected.shape
    different = resized != expected
    assert different.mean() < 0.001
    assert np.abs(resized.astype(int) - expected)[different].max(initial=0) <= 1


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
def test_noise(shape, size, seed):
    # Full contrast from pixel to pixel: what is rounded and cut between the two passes matters.
    image = np.random.default_rng(seed).choice(np.uint8([0, 3, 128, 255]), (*shape, 3))
    resized = resize(image, size).numpy().astype(int)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], BICUBIC), int)
    # Exact ties, which such values and ratios give, may go either way; the second pass can add two up.
    difference = np.abs(resized - expected)
    assert difference.max() <= 2 and (difference <= 1).mean() > 0.999


@pytest.mark.parametrize("mirrored", [False, True])
def test_window_is_a_part_of_the_whole(photo, mirrored, in_tf_data):
    def part(image):
        window = tf.constant([7, 11, 100, 61])
        return resize(image, (150, 200), window=window, mirrored=tf.constant(mirrored))

    whole = resize(np.asarray(photo), (150, 200)).numpy()[7:107, 11:72]
    expected = whole[:, ::-1] if mirrored else whole
    np.testing.assert_array_equal(in_tf_data(part, np.asarray(photo)), expected)


def test_one_channel(photo):
    grey = photo.convert("L")
    resized = resize(np.asarray(grey)[..., None], (100, 90)).numpy()
    difference = resized[..., 0].astype(int) - np.asarray(grey.resize((90, 100), BICUBIC))
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.001


@pytest.mark.parametrize("size", [(112, 160), (300, 90), (853, 1000)])
def test_bilinear_photograph(photo, size, close):
    resized = resize(np.asarray(photo), size, kernel=BILINEAR).numpy()
    assert close(resized, photo.resize(size[::-1], Image.Resampling.BILINEAR))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mirrored=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nearest_takes_the_pixel_that_the_centre_lies_in(shape, size, mirrored, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 9, (2, *shape), np.int32)
    top, left = (int(rng.integers(0, side)) for side in size)
    window = tf.constant([top, left, size[0] - top, size[1] - left])
    resized = resize_nearest(tf.constant(values), size, window=window, mirrored=mirrored).numpy()
    # In whole numbers: output pixel i of n lies at (2 i + 1) / (2 n) of the side.
    rows, columns = (
        (2 * np.arange(first, count) + 1) * side // (2 * count)
        for first, count, side in zip((top, left), size, shape, strict=True)
    )
    expected = values[:, rows][:, :, columns[::-1] if mirrored else columns]
    assert resized.dtype == values.dtype
    # A centre on the edge between two pixels may fall to either of them in floating point.
    edges = [
        ((2 * np.arange(first, count) + 1) * side % (2 * count) == 0)
        for first, count, side in zip((top, left), size, shape, strict=True)
    ]
    exact = ~edges[0][:, None] & ~(edges[1][::-1] if mirrored else edges[1])[None]
    np.testing.assert_array_equal(resized[:, exact], expected[:, exact])


def test_nearest_equals_pillow(photo):
    grey = photo.convert("L")
    # Widths for which no centre lies on an edge between two pixels, where Pillow's running sums decide.
    for size in [(100, 256), (427, 640), (500, 896)]:
        resized = resize_nearest(tf.constant(np.asarray(grey)), size).numpy()
        np.testing.assert_array_equal(resized, grey.resize(size[::-1], Image.Resampling.NEAREST))


def cubic(x):
    """Keys' kernel, written out."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def literal(image, size):
    """Antialiased bicubic resizing, a value at a time, in float64."""
    for axis, length in enumerate(size):
        scale = image.shape[axis] / length
        stretch = max(scale, 1)
        weights = np.zeros((length, image.shape[axis]))
        for out in range(length):
            for place in range(image.shape[axis]):
                weights[out, place] = cubic((place + 0.5 - (out + 0.5) * scale) / stretch)
            weights[out] /= weights[out].sum()
        image = np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)
    return image


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float16", "float32"])
@pytest.mark.parametrize("size", [(9, 14), (40, 25), (20, 60)])
def test_arrays_are_resized_as_numpy_does_it(dtype, size, in_tf_data):
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-1000, 1000)
    image = (rng.random((23, 31, 5)) * (high - low) + low).astype(dtype)
    found = in_tf_data(lambda x: resize(x, size), image)
    expected = np.clip(
        literal(image.astype(np.float64), size), *((low, high) if dtype.kind in "iu" else (None, None))
    )
    bound = 1e-4 * (float(high) - float(low))
    if dtype == np.float16:
        bound += float(np.spacing(np.float16(1500)))  # what the dtype itself cannot hold
    assert found.dtype == dtype and np.abs(found.astype(np.float64) - expected).max() <= bound
