"""Photographs, and how they are encoded, run through tf.data and compared."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from cnx2_jax.data.tensorflow import tf


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """scikit-learn's china.jpg, 640 x 427."""
    return Image.fromarray(load_sample_image("china.jpg"))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode():
    """The function `encoded(image, kind, **options)`: the file's bytes."""
    return encoded


def within_a_level(image, expected) -> bool:
    """Within one grey level on 99.9% of the values."""
    difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
    return np.asarray(image).shape == np.asarray(expected).shape and (difference <= 1).mean() > 0.999


@pytest.fixture(scope="session")
def close():
    """The function `within_a_level(image, expected)`."""
    return within_a_level


def through_tf_data(function, *arguments):
    """Runs in graph mode, as the pipeline does."""
    options = tf.autograph.experimental.do_not_convert
    dataset = tf.data.Dataset.from_tensors(arguments).map(options(function))
    return next(dataset.as_numpy_iterator())


@pytest.fixture(scope="session")
def in_tf_data():
    """The function `through_tf_data(function, *arguments)`."""
    return through_tf_data
