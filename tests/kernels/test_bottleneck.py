"""The inverted bottleneck, with its own gradient, against the same layers differentiated by JAX."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels import bottleneck
from cnx2_jax.kernels.bottleneck import Weights, inverted_bottleneck

pytestmark = pytest.mark.usefixtures("compile_quickly")

CHANNELS, HIDDEN = 6, 10
# Positions per sample: GRN's factor goes into the second layer's weights from as many as channels on.
POSITIONS = {"folded": 15, "just folded": CHANNELS, "not folded": CHANNELS - 1, "one position": 1}


def plain(x, visible, weights):
    """LayerNorm -> Linear -> GELU -> GRN -> Linear, as the paper has them."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    x = x * weights.norm_scale + weights.norm_bias
    x = jax.nn.gelu(x @ weights.kernel1 + weights.bias1, approximate=False)
    squares = jnp.square(x) if visible is None else jnp.square(x) * visible
    response = jnp.sqrt(squares.sum(axis=1, keepdims=True) + 1e-6)
    response = response / (response.mean(axis=-1, keepdims=True) + 1e-6)
    x = weights.gamma * (x * response) + weights.beta + x
    return x @ weights.kernel2 + weights.bias2


def example(positions, dtype, some_hidden, batch=3, channels=CHANNELS, hidden=HIDDEN):
    """Returns x, visible, weights and a gradient of the output, zero where nothing is visible.

    No weight is near 0 or 1, and the samples and channels are of different sizes.
    """
    rng = np.random.default_rng(positions)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    x = 1 + draw(batch, positions, channels) * np.arange(1, batch + 1).reshape(-1, 1, 1)
    weights = Weights(
        norm_scale=1 + 0.3 * draw(channels),
        norm_bias=0.5 * draw(channels),
        kernel1=draw(channels, hidden) / math.sqrt(channels),
        bias1=0.5 * draw(hidden),
        gamma=0.7 * draw(hidden),
        beta=0.5 * draw(hidden),
        kernel2=draw(hidden, channels) / math.sqrt(hidden),
        bias2=0.5 * draw(channels),
    )
    gradient = draw(batch, positions, channels)
    visible = None
    if some_hidden:
        visible = rng.random((batch, positions, 1)) < 0.6
        visible[:, 0] = True
        gradient = jnp.asarray(gradient * visible, dtype)
        visible = jnp.asarray(visible)
    narrow = lambda a: jnp.asarray(a, dtype)  # noqa: E731
    wide = jnp.promote_types(dtype, jnp.float32)
    return narrow(x), visible, Weights(*(jnp.asarray(w, wide) for w in weights)), narrow(gradient)


def results(function, x, visible, weights, gradient):
    """The output at visible positions, zero elsewhere, and the gradients in x and every weight, by name."""
    y, pull = jax.vjp(lambda x, weights: function(x, visible, weights), x, weights)
    x_gradient, weight_gradients = pull(gradient)
    y = y if visible is None else jnp.where(visible, y, 0)
    return {"y": y, "x": x_gradient, **weight_gradients._asdict()}


def compare(dtype, positions, some_hidden, bound, error):
    data = example(POSITIONS[positions], dtype, some_hidden)
    found = jax.jit(lambda *data: results(inverted_bottleneck, *data))(*data)
    expected = jax.jit(lambda *data: results(plain, *data))(*data)
    assert len(found) == 10
    for name, array in found.items():
        assert array.dtype == expected[name].dtype == dtype, name
        assert error(array, expected[name]) < bound, name


BOTH = [(positions, hidden) for positions in ("folded", "not folded") for hidden in (False, True)]


@pytest.mark.parametrize(
    ("positions", "some_hidden"), [*BOTH, ("just folded", True), ("one position", False)]
)
def test_float64(positions, some_hidden, error):
    """Value and every gradient, to rounding."""
    with jax.enable_x64(True):
        compare(jnp.float64, positions, some_hidden, 1e-12, error)


@pytest.mark.parametrize(("positions", "some_hidden"), [("folded", True), ("not folded", False)])
def test_float32(positions, some_hidden, error):
    compare(jnp.float32, positions, some_hidden, 1e-5, error)


@pytest.mark.parametrize(("positions", "some_hidden"), [(64, True), (20, False)])
def test_bfloat16_tracks_float32(positions, some_hidden, error):
    """Weights' gradients are float32, and off by no more than a few roundings of products' operands.

    Those of the last bias and of beta, sums over the output's gradient, are off by float32's alone.
    """
    data = example(positions, jnp.bfloat16, some_hidden, channels=32, hidden=128)
    found = jax.jit(lambda *data: results(inverted_bottleneck, *data))(*data)
    x, visible, weights, gradient = data
    wide = x.astype(jnp.float32), visible, weights, gradient.astype(jnp.float32)
    expected = jax.jit(lambda *data: results(plain, *data))(*wide)
    for name, array in found.items():
        assert array.dtype == (jnp.bfloat16 if name in ("y", "x") else jnp.float32), name
        assert error(array, expected[name]) < (1e-6 if name in ("beta", "bias2") else 0.016), name


def test_what_stands_at_invisible_positions_has_no_influence():
    """Neither on visible positions, nor on any gradient."""
    x, visible, weights, gradient = example(15, jnp.float32, True)
    assert 0 < visible.mean() < 1
    run = jax.jit(lambda *data: results(inverted_bottleneck, *data))
    before = run(x, visible, weights, gradient)
    after = run(jnp.where(visible, x, 100 - 7 * x), visible, weights, gradient)
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert (jnp.where(visible, 0, before["x"]) == 0).all()


@pytest.mark.parametrize("positions", [15, 4])
def test_dead_hidden_channel_has_finite_gradients(positions):
    """Where GELU gives zero everywhere, GRN's root is of zero: only the epsilon keeps it finite."""
    x, _, weights, gradient = example(positions, jnp.float32, False)
    weights = weights._replace(kernel1=weights.kernel1.at[:, 3].set(0), bias1=weights.bias1.at[3].set(-60))
    found = jax.jit(lambda *data: results(inverted_bottleneck, x, None, *data))(weights, gradient)
    for name, array in found.items():
        assert jnp.isfinite(array).all(), name


def test_samples_do_not_mix():
    x, visible, weights, _ = example(15, jnp.float32, True)
    together = inverted_bottleneck(x, visible, weights)
    changed = inverted_bottleneck(x.at[1:].mul(-3), visible, weights)
    np.testing.assert_array_equal(together[0], changed[0])
    assert (together[1:] != changed[1:]).any()


# GELU.

POINTS = np.linspace(-8, 8, 641)


def exact(u):
    return 0.5 * u * math.erfc(-u / math.sqrt(2))


def exact_slope(u):
    density = math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    return 0.5 * math.erfc(-u / math.sqrt(2)) + u * density


def value_and_slope(points, dtype):
    """GELU inside the kernel, of a first layer that adds nothing."""
    zeros = jnp.zeros((1, 1))
    weights = Weights(*(zeros[0], zeros[0], zeros, zeros[0]) * 2)
    pair = bottleneck._gelu(jnp.asarray(points, dtype), weights)
    return tuple(np.asarray(a, np.float64) for a in pair)


def test_gelu_in_float32():
    """Far closer than the tanh form, which is up to 5e-4 away."""
    found, slope = value_and_slope(POINTS, jnp.float32)
    points = POINTS.astype(np.float32).astype(float)
    np.testing.assert_allclose(found, [exact(u) for u in points], rtol=5e-7, atol=1e-6)
    np.testing.assert_allclose(slope, [exact_slope(u) for u in points], rtol=5e-7, atol=1e-6)


def test_gelu_in_float64_against_differences():
    with jax.enable_x64(True):
        found, slope = value_and_slope(POINTS, jnp.float64)
    np.testing.assert_allclose(found, [exact(u) for u in POINTS], atol=1e-14)
    step = 1e-5
    differences = [(exact(u + step) - exact(u - step)) / (2 * step) for u in POINTS]
    np.testing.assert_allclose(slope, differences, atol=1e-9)


def test_gelu_far_out():
    """Nothing overflows, and the slope is 0 or 1."""
    found, slope = value_and_slope([-1e20, -100, 0, 100, 1e20], jnp.float32)
    np.testing.assert_allclose(found, [0, 0, 0, 100, 1e20], rtol=1e-6)
    np.testing.assert_allclose(slope, [0, 0, 0.5, 1, 1], atol=1e-7)
