"""GELU and the mean over channels against their formulas, with gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels import pointwise
from cnx2_jax.kernels.pointwise import gelu, mean_channels

POINTS = np.linspace(-8, 8, 641)


def exact(u):
    return 0.5 * u * math.erfc(-u / math.sqrt(2))


def exact_slope(u):
    density = math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    return 0.5 * math.erfc(-u / math.sqrt(2)) + u * density


def value_and_slope(x):
    y, pull = jax.vjp(gelu, x)
    (slope,) = pull(jnp.ones_like(y))
    return np.asarray(y, np.float64), np.asarray(slope, np.float64)


def test_gelu_in_float32():
    """Far closer than the tanh form, which is up to 5e-4 away."""
    found, slope = value_and_slope(jnp.asarray(POINTS, jnp.float32))
    points = POINTS.astype(np.float32).astype(float)
    np.testing.assert_allclose(found, [exact(u) for u in points], rtol=5e-7, atol=1e-6)
    np.testing.assert_allclose(slope, [exact_slope(u) for u in points], rtol=5e-7, atol=1e-6)


def test_gelu_in_bfloat16_is_rounded_once():
    x = jnp.asarray(POINTS, jnp.bfloat16)
    y, pull = jax.vjp(gelu, x)
    assert y.dtype == pull(y)[0].dtype == jnp.bfloat16
    found, slope = value_and_slope(x)
    points = np.asarray(x, np.float64)
    np.testing.assert_allclose(found, [exact(u) for u in points], rtol=1.001 * 2**-8, atol=1e-6)
    np.testing.assert_allclose(slope, [exact_slope(u) for u in points], rtol=1.001 * 2**-8, atol=1e-6)


def test_gelu_in_float64_against_differences():
    with jax.enable_x64(True):
        found, slope = value_and_slope(jnp.asarray(POINTS, jnp.float64))
    np.testing.assert_allclose(found, [exact(u) for u in POINTS], atol=1e-14)
    step = 1e-5
    differences = [(exact(u + step) - exact(u - step)) / (2 * step) for u in POINTS]
    np.testing.assert_allclose(slope, differences, atol=1e-9)


def test_gelu_far_out():
    """Nothing overflows, and the gradient is 0 or 1."""
    x = jnp.asarray([-1e20, -100, 0, 100, 1e20], jnp.float32)
    found, slope = value_and_slope(x)
    np.testing.assert_array_equal(found, np.maximum(np.asarray(x, np.float64), 0))
    np.testing.assert_allclose(slope, [0, 0, 0.5, 1, 1], atol=1e-7)


@pytest.mark.parametrize("form", ["cpu", "other"])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (2, 3, 4, 40)])
def test_mean_channels(shape, form, monkeypatch):
    if form == "other":
        choose = lambda x, default, **_: default(x)  # noqa: E731
        monkeypatch.setattr(pointwise.lax, "platform_dependent", choose)
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.standard_normal(shape), jnp.float32)
    found, pull = jax.vjp(mean_channels, x)
    expected = np.asarray(x, np.float64).mean(axis=-1, keepdims=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    weights = jnp.asarray(rng.standard_normal(expected.shape), jnp.float32)
    gradient = np.broadcast_to(weights / shape[-1], shape)
    np.testing.assert_allclose(pull(weights)[0], gradient, rtol=1e-6)
