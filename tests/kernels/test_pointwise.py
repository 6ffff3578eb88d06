"""LayerNorm's core against its formulas, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels import pointwise
from cnx2_jax.kernels.pointwise import mean_channels, standardise, statistics, statistics_gradient, widened

SHAPES = [(7,), (2, 3, 5), (2, 3, 4, 40)]


@pytest.fixture(params=["cpu", "other"])
def platform(request, monkeypatch):
    """Runs a test with the CPU's form and with the form of the other platforms, both on the CPU."""
    if request.param == "other":
        choose = lambda x, default, **_: default(x)  # noqa: E731
        monkeypatch.setattr(pointwise.lax, "platform_dependent", choose)
    return request.param


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(3 + np.random.default_rng(seed).standard_normal(shape), dtype)


def literal(x):
    """Every position at mean 0 and variance 1, and its inverse deviation, in float64."""
    x = np.asarray(x, np.float64)
    normal, inverse = np.empty_like(x), np.empty((*x.shape[:-1], 1))
    for index in np.ndindex(x.shape[:-1]):
        v = x[index]
        mean = sum(v) / len(v)
        inverse[index] = 1 / np.sqrt(sum((v - mean) ** 2) / len(v) + 1e-6)
        normal[index] = (v - mean) * inverse[index]
    return normal, inverse


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_channels(shape, platform):
    x = normal(shape)
    found, pull = jax.vjp(mean_channels, x)
    expected = np.asarray(x, np.float64).mean(axis=-1, keepdims=True)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    weights = normal(expected.shape, seed=1)
    gradient = np.broadcast_to(weights / shape[-1], shape)
    np.testing.assert_allclose(pull(weights)[0], gradient, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 1e-3])
def test_statistics(shape, size, platform, error):
    """At a deviation of 1e-3 another epsilon would show."""
    x = size * (normal(shape) - 3)
    for found, expected in zip(statistics(x), literal(x), strict=True):
        assert found.dtype == jnp.float32 and error(found, expected) < 1e-5
    np.testing.assert_array_equal(standardise(x), statistics(x)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_against_differences(shape, platform, error):
    """Of `standardise`, and by `statistics_gradient`, in float64 against differences of the formula."""
    with jax.enable_x64(True):
        x, weights = normal(shape, jnp.float64), normal(shape, jnp.float64, seed=1)
        _, pull = jax.vjp(standardise, x)
        found = [np.array(pull(weights)[0]), np.array(statistics_gradient(weights, *statistics(x)))]
    x, weights, step = np.array(x), np.array(weights), 1e-5
    differences = np.empty(shape)
    for index in np.ndindex(shape):
        one = np.zeros(shape)
        one[index] = step
        differences[index] = ((literal(x + one)[0] - literal(x - one)[0]) * weights).sum() / (2 * step)
    for gradient in found:
        assert gradient.dtype == np.float64 and error(gradient, differences) < 1e-8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_input_is_widened(dtype, error):
    """Statistics of narrow values are float32; the gradient is rounded to their dtype, and only then."""
    x, weights = normal((4, 40), dtype), normal((4, 40), seed=1)
    found, pull = jax.vjp(standardise, x)
    assert found.dtype == jnp.float32 and error(found, literal(x)[0]) < 1e-6
    (gradient,) = pull(weights)
    assert gradient.dtype == dtype
    expected = jax.vjp(standardise, x.astype(jnp.float32))[1](weights)[0]
    assert error(gradient, expected) < 2 * float(jnp.finfo(dtype).eps)


def test_widened():
    """Float32 at least: narrower dtypes become float32, wider ones stay."""
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        assert widened(jnp.ones(3, dtype)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert widened(jnp.ones(3, jnp.float64)).dtype == jnp.float64
