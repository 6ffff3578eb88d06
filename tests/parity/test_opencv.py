"""Colours and sizes as OpenCV computes them, which mmsegmentation uses."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from cnx2_jax.data.distortion import from_hsv, saturate, to_hsv, turn_hue
from cnx2_jax.data.resizing import PLAIN_BILINEAR, resize
from cnx2_jax.data.tensorflow import tf

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def images():
    """A photograph, and noise, in which every colour is as likely."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    return [load_sample_image("flower.jpg")[::2, ::2], noise]


def assert_close(ours, theirs):
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.shape == theirs.shape
    assert (difference <= 1).all(axis=-1).mean() >= 0.999, np.bincount(difference.reshape(-1))


def test_hsv_and_back(images):
    for image in images:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        ours = tf.stack(to_hsv(tf.constant(image)), axis=-1).numpy()
        np.testing.assert_array_equal(ours, hsv)
        back = from_hsv(*tf.unstack(tf.cast(hsv, tf.int32), axis=-1)).numpy()
        theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        assert_close(back, theirs)
        # Off by a level at the end of each row, and where OpenCV truncates 24.9999 for 25.
        assert (back == theirs)[:, :256].mean() > 0.95


@pytest.mark.parametrize("factor", [0.5, 0.93, 1.5])
def test_saturation(images, factor):
    for image in images:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        scaled = hsv[..., 1].astype(np.float32) * np.float32(factor)
        hsv[..., 1] = np.clip(scaled, 0, 255).astype(np.uint8)
        assert_close(saturate(tf.constant(image), factor), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


@pytest.mark.parametrize("steps", [-18, -1, 0, 17])
def test_hue(images, steps):
    for image in images:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + steps) % 180
        assert_close(turn_hue(tf.constant(image), steps), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


@pytest.mark.parametrize("size", [(150, 150), (301, 97), (64, 512), (75, 600), (214, 320)])
def test_bilinear_resizing(images, size):
    for image in images:
        theirs = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        assert_close(resize(tf.constant(image), size, kernel=PLAIN_BILINEAR), theirs)
