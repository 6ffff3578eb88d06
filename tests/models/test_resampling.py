"""Resizing and pooling against loops over single values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models.resampling import adaptive_pool, resize


def literal_resize(x, height, width):
    """Each value from its four neighbours, positions being pixel centres, clamped to the map."""
    result = np.zeros((len(x), height, width, x.shape[-1]))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * x.shape[1] / height - 0.5, 0), x.shape[1] - 1)
            z = min(max((column + 0.5) * x.shape[2] / width - 0.5, 0), x.shape[2] - 1)
            for i, weight_i in ((math.floor(y), 1 - y % 1), (math.ceil(y), y % 1)):
                for j, weight_j in ((math.floor(z), 1 - z % 1), (math.ceil(z), z % 1)):
                    result[:, row, column] += weight_i * weight_j * x[:, i, j]
    return result


def literal_pool(x, bins):
    result = np.zeros((len(x), bins, bins, x.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            rows = slice(math.floor(i * x.shape[1] / bins), math.ceil((i + 1) * x.shape[1] / bins))
            columns = slice(math.floor(j * x.shape[2] / bins), math.ceil((j + 1) * x.shape[2] / bins))
            result[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return result


@pytest.mark.parametrize("to", [(6, 8), (24, 16), (5, 11), (2, 3), (1, 1), (3, 4)])
def test_resize(to, error):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, 3, 4, 2))
        assert error(resize(jnp.asarray(x), to), literal_resize(x, *to)) < 1e-14


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(6, 12), (2, 3), (7, 5), (16, 20)])
def test_adaptive_pool(size, bins, error):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, *size, 2))
        assert error(adaptive_pool(jnp.asarray(x), bins), literal_pool(x, bins)) < 1e-14


def test_narrow_maps_stay_narrow():
    assert resize(jnp.ones((1, 2, 2, 1), jnp.bfloat16), (4, 4)).dtype == jnp.bfloat16
