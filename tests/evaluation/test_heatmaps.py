"""Grad-CAM against the formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.evaluation.heatmaps import heatmaps
from cnx2_jax.models.pixels import normalise
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, models


@pytest.mark.parametrize("each", [False, True])
def test_maps_are_channels_weighted_by_gradients(compile_quickly, random_params, each):
    config = defaults("classify")
    use_digits(config)
    config.model.depths, config.model.dims = (1, 1, 1, 1), (4, 4, 8, 8)
    model = random_params(nnx.eval_shape(lambda: models.build(config, 3, nnx.Rngs(0))), 0)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 1)).astype(np.uint8)
    batch = {"image": images, "mask": np.array([True, True, True, False])}
    found = list(heatmaps(model, config, [batch], each=each))
    assert len(found) == 3 and all(
        (drawn == image).all() for (drawn, _), image in zip(found, images, strict=False)
    )

    stage = jax.jit(lambda x: model.features(x)[-1])(normalise(images, config.data.mean, config.data.std))
    for (_, heat), one in zip(found, stage, strict=False):

        def output(mean, place):
            return model.head(model.norm(mean))[place]

        mean = one.mean(axis=(0, 1))
        best = int(jnp.argmax(model.head(model.norm(mean))))
        for place, map in zip(range(3) if each else [best], heat, strict=True):
            # Every position has the same share of the mean, so of the gradient.
            weights = jax.grad(output)(mean, place) / (one.shape[0] * one.shape[1])
            np.testing.assert_allclose(map, np.maximum((one * weights).sum(-1), 0), rtol=1e-4, atol=1e-6)
    assert any(heat.max() > 0 for _, heat in found)
