"""The full convolution against XLA's own, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels.convolution import conv, native_conv


@pytest.mark.parametrize("size", [(3, 3), (1, 1), (5, 3)])
def test_value_and_gradients(size, error):
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((2, 5, 7, 3), (*size, 3, 4), (2, 5, 7, 4))
    )
    y, backward = jax.vjp(conv, x, kernel)
    expected, expected_backward = jax.vjp(native_conv, x, kernel)
    assert error(y, expected) < 1e-6
    for found, right in zip(backward(weights), expected_backward(weights), strict=True):
        assert error(found, right) < 1e-5


def test_literally(error):
    """Each value is the sum over its neighbours, zero outside."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 4, 3, 2)), rng.standard_normal((3, 3, 2, 5))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((1, 4, 3, 5))
    for row, column in np.ndindex(4, 3):
        expected[0, row, column] = np.einsum(
            "yxi,yxio->o", padded[0, row : row + 3, column : column + 3], kernel
        )
    with jax.enable_x64(True):
        assert error(conv(jnp.asarray(x), jnp.asarray(kernel)), expected) < 1e-14


def test_narrow_values_have_narrow_gradients(error):
    """bfloat16 in, bfloat16 out; the kernel's gradient is summed in float32."""
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((4, 16, 16, 2), (3, 3, 2, 2), (4, 16, 16, 2))
    )
    y, backward = jax.vjp(conv, x, kernel)
    found = (y, *backward(weights))
    wide = (a.astype(jnp.float32) for a in (x, kernel))
    expected, expected_backward = jax.vjp(native_conv, *wide)
    expected = (expected, *expected_backward(weights.astype(jnp.float32)))
    for narrow, right in zip(found, expected, strict=True):
        assert narrow.dtype == jnp.bfloat16 and error(narrow.astype(jnp.float32), right) < 2**-7
