"""The average over an image and its mirror image is the mean of probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.evaluation.outputs import ANY_CLASSES, ONE_CLASS, VALUES


@pytest.mark.parametrize("kind", [ONE_CLASS, ANY_CLASSES, VALUES])
def test_mean_over_both_views(kind):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 3, 5), np.float32))

    def model(images):
        return 4 * images[:, 0, 0]

    plain = kind.of(model, images, flip=False)
    np.testing.assert_array_equal(plain, model(images))
    expected = (kind.value(model(images)) + kind.value(model(images[:, :, ::-1]))) / 2
    np.testing.assert_allclose(kind.value(kind.of(model, images, flip=True)), expected, atol=1e-6)
    assert not np.allclose(expected, kind.value(plain))


def test_a_sure_probability_stays_finite():
    sure = jnp.array([[60.0, -60.0]])
    assert jnp.isfinite(ANY_CLASSES.average(sure, sure)).all()
    np.testing.assert_allclose(ANY_CLASSES.average(sure, sure), sure, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(ONE_CLASS.average(sure, -sure)), [[0.5, 0.5]], atol=1e-6)
