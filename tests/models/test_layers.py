"""Each layer against its formula in NumPy, its initial values and its dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.models.layers import GRN, LayerNorm, Linear, PatchConv, normal_init, stochastic_depth
from cnx2_jax.models.layouts import Dense

BFLOAT16_ROUNDING = 2**-8  # half a unit in the last of 8 binary digits


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def literal_layer_norm(x, scale, bias):
    x = np.asarray(x, np.float64)
    y = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        v = x[index]
        mean = sum(v) / len(v)
        variance = sum((v - mean) ** 2) / len(v)
        y[index] = (v - mean) / np.sqrt(variance + 1e-6) * scale + bias
    return y


def literal_grn(x, gamma, beta, visible=None):
    x = np.asarray(x, np.float64)
    batch, height, width, channels = x.shape
    y = np.empty_like(x)
    for b in range(batch):
        norm = np.zeros(channels)
        for r in range(height):
            for c in range(width):
                if visible is None or visible[b, r, c]:
                    norm += x[b, r, c] ** 2
        norm = np.sqrt(norm + 1e-6)
        y[b] = gamma * (x[b] * (norm / (norm.mean() + 1e-6))) + beta + x[b]
    return y


def test_layer_norm(random_params, error):
    layer = random_params(LayerNorm(6, dtype=jnp.float32), 1)
    x = 3 + 2 * normal(2, 3, 4, 6)
    expected = literal_layer_norm(x, layer.scale[...], layer.bias[...])
    assert error(layer(x), expected) < 1e-6


def test_layer_norm_epsilon(error):
    """At variance near 1e-6 another epsilon would show."""
    layer = LayerNorm(6, dtype=jnp.float32)
    x = 1e-3 * normal(2, 6)
    assert error(layer(x), literal_layer_norm(x, 1, 0)) < 1e-5


def test_grn(random_params, error):
    layer = random_params(GRN(6, dtype=jnp.float32), 2)
    x = normal(3, 4, 5, 6) * jnp.arange(1.0, 7)
    gamma, beta = np.asarray(layer.gamma[...]), np.asarray(layer.beta[...])
    assert np.abs(gamma).min() > 0 and np.abs(beta).min() > 0
    assert error(layer(x), literal_grn(x, gamma, beta)) < 1e-6


def test_grn_epsilons(random_params, error):
    layer = random_params(GRN(6, dtype=jnp.float32), 2)
    x = (1e-4 * normal(3, 4, 5, 6)).at[0].set(0)
    expected = literal_grn(x, np.asarray(layer.gamma[...]), 0)
    assert error(layer(x) - layer.beta[...], expected) < 1e-3


def test_grn_over_visible_positions_of_each_sample(random_params, error):
    layer = random_params(GRN(6, dtype=jnp.float32), 2)
    x = normal(3, 4, 5, 6)
    visible = np.random.default_rng(0).random((3, 4, 5)) < 0.4
    expected = literal_grn(x, layer.gamma[...], layer.beta[...], visible)
    for shape in (4, 5), (20,):  # as a map, and as a block has it
        found = layer(x.reshape(3, *shape, 6), jnp.asarray(visible).reshape(3, *shape, 1))
        assert error(found.reshape(x.shape)[visible], expected[visible]) < 1e-6


def test_grn_is_per_sample(random_params):
    layer = random_params(GRN(6, dtype=jnp.float32), 2)
    x = normal(3, 4, 5, 6)
    other = x.at[1:].mul(100)
    np.testing.assert_array_equal(layer(x)[0], layer(other)[0])


@pytest.mark.parametrize("dead", ["a channel", "everything"])
def test_grn_gradient_of_a_dead_channel_is_finite(dead, random_params):
    layer = random_params(GRN(4, dtype=jnp.float32), 3)
    x = normal(2, 3, 3, 4).at[..., 1 if dead == "a channel" else slice(None)].set(0)
    gradients = jax.grad(lambda m, x: jnp.square(m(x)).sum(), argnums=(0, 1))(layer, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert jnp.abs(gradients[1]).max() > 0


def test_bfloat16_rounds_only_the_result(random_params):
    """Statistics, scale and shift are float32: against float64, one rounding of the result remains."""
    x = (5 + normal(2, 16, 16, 24)).astype(jnp.bfloat16)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    norm = random_params(LayerNorm(24, dtype=jnp.bfloat16), 4)
    grn = random_params(GRN(24, dtype=jnp.bfloat16), 5)
    pairs = [
        (norm(x), literal_layer_norm(exact, norm.scale[...], norm.bias[...])),
        (grn(x), literal_grn(exact, grn.gamma[...], grn.beta[...])),
    ]
    for found, expected in pairs:
        assert found.dtype == jnp.bfloat16
        found = np.asarray(found.astype(jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1.001 * BFLOAT16_ROUNDING, atol=2e-6)


def test_float16_sums_do_not_overflow():
    x = jnp.full((1, 32, 32, 8), 200, jnp.float16)  # one square is 40000, two exceed float16
    grn = GRN(8, dtype=jnp.float16)
    grn.gamma[...] = jnp.ones(8)
    np.testing.assert_allclose(grn(x).astype(jnp.float32), 400, rtol=1e-3)
    norm = LayerNorm(8, dtype=jnp.float16)(x * jnp.asarray([1, -1] * 4, jnp.float16))
    np.testing.assert_allclose(jnp.abs(norm.astype(jnp.float32)), 1, rtol=1e-3)


def test_linear_and_patch_convolution(random_params, error):
    linear = random_params(Linear(5, 7, dtype=jnp.float32, rngs=nnx.Rngs(0)), 6)
    x = normal(2, 3, 5)
    expected = np.einsum("abi,io->abo", x, linear.kernel[...]) + np.asarray(linear.bias[...])
    assert error(linear(x), expected) < 1e-6

    conv = random_params(PatchConv(2, 3, 7, dtype=jnp.float32, rngs=nnx.Rngs(0)), 7)
    images = normal(2, 6, 4, 3)
    pixels = np.asarray(images, np.float64)
    kernel, expected = np.asarray(conv.kernel[...], np.float64), np.zeros((2, 3, 2, 7))
    for r in range(3):
        for c in range(2):
            for i in range(2):
                for j in range(2):
                    expected[:, r, c] += pixels[:, 2 * r + i, 2 * c + j] @ kernel[i, j]
    found = conv(Dense().patches(images))
    assert error(found, expected + np.asarray(conv.bias[...])) < 1e-6


def test_initial_kernels_are_a_truncated_normal():
    """Standard deviation 0.02, cut at +-2 in absolute units: that is at 100 deviations, not at 2."""
    values = np.asarray(normal_init()(jax.random.key(0), (500, 1000)))
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert abs(values.mean()) < 2e-4
    beyond = (np.abs(values) > 0.04).mean()  # 4.55% of a normal
    assert beyond == pytest.approx(0.0455, rel=0.05)
    wide = np.asarray(normal_init(1.0)(jax.random.key(0), (500, 1000)))
    assert np.abs(wide).max() <= 2 and wide.std() == pytest.approx(0.8796, rel=0.01)


# Stochastic depth.

KEYS = jax.random.split(jax.random.key(0), 4000)


def test_stochastic_depth_keeps_the_expectation():
    """Factors are 0 or 1 / (1 - rate), on average 1, block by block."""
    rates = (0.0, 0.3, 0.6)
    factors = np.asarray(stochastic_depth(KEYS, rates))
    assert factors.shape == (3, len(KEYS)) and factors.dtype == np.float32
    for rate, drawn in zip(rates, factors, strict=True):
        np.testing.assert_allclose(drawn[drawn > 0], 1 / (1 - rate), rtol=1e-6)
        deviation = np.sqrt(rate / (1 - rate) / len(KEYS))
        assert abs(drawn.mean() - 1) <= 4 * deviation
    np.testing.assert_array_equal(factors[0], 1)


def test_stochastic_depth_of_blocks_is_uncorrelated():
    correlation = np.corrcoef(np.asarray(stochastic_depth(KEYS, [0.5] * 6))) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(KEYS))


def test_stochastic_depth_is_of_the_key_and_the_index():
    """A draw knows neither the rest of the batch nor how many blocks come after."""
    factors = stochastic_depth(KEYS[:20], (0.2, 0.5, 0.8))
    np.testing.assert_array_equal(factors, stochastic_depth(KEYS[:20], (0.2, 0.5, 0.8)))
    np.testing.assert_array_equal(factors[:, 7:9], stochastic_depth(KEYS[7:9], (0.2, 0.5, 0.8)))
    np.testing.assert_array_equal(factors[:2], stochastic_depth(KEYS[:20], (0.2, 0.5)))
