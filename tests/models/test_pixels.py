"""Pixels to numbers and back."""

import numpy as np
import pytest

from cnx2_jax.models.pixels import denormalise, normalise


@pytest.mark.parametrize(
    ("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.3,), (0.35,)), ((0.0,), (1.0,))]
)
def test_normalise_and_back(mean, std):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(len(mean), axis=3)
    normal = normalise(images, mean, std)
    assert normal.dtype == np.float32
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normal, expected, rtol=0, atol=2e-6)
    back = denormalise(normal, mean, std)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)


def test_denormalise_clips_and_rounds():
    values = np.float32([-9, -0.001, 0.0019, 0.0021, 1.001, 9]).reshape(1, 1, 6, 1)
    assert denormalise(values, (0.0,), (1.0,)).ravel().tolist() == [0, 0, 0, 1, 255, 255]
