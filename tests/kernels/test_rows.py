"""Rows picked and moved by index, and convolution in windows, against NumPy loops and JAX's own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels import rows
from cnx2_jax.kernels.rows import Windows, depthwise_conv_windows, move, pick


def as_on_tpu(*arguments, default=None, tpu=None, **others):
    return (tpu or default)(*arguments)


@pytest.fixture(params=["cpu", "tpu"])
def form(request, monkeypatch):
    """Runs a test with the CPU's forms of all kernels and with the TPU's; both on the CPU."""
    if request.param == "tpu":
        monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpu)
    return request.param


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Picking.


def test_pick():
    """Row by row; zeros where the index is out of range, whether by one or by far; rows may repeat."""
    x = normal(2, 4, 3)
    index = np.array([[3, 0, 4, 3, 1], [1000, 2, 2, 5, 0]])
    found = np.asarray(pick(x, jnp.asarray(index)))
    for b, m in np.ndindex(index.shape):
        expected = x[b, index[b, m]] if index[b, m] < 4 else np.zeros(3)
        np.testing.assert_array_equal(found[b, m], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_is_the_gather(dtype):
    """Exactly, bit for bit: also for values of many binary digits and very different sizes."""
    x = normal(3, 50, 7) * 10.0 ** jnp.arange(-12, 9, 3)
    x = x.astype(dtype)
    index = jnp.asarray(np.random.default_rng(1).integers(0, 60, (3, 80)))
    assert (index >= 50).any()
    found, expected = rows._pick_by_product(x, index), rows._pick_by_gather(x, index)
    assert found.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("platform", "products", "gathers"), [("cpu", 0, 1), ("tpu", 1, 0), ("cuda", 0, 1)])
def test_form_of_each_platform(platform, products, gathers):
    """Lowered for TPU there is no gather but a matrix product; elsewhere the other way round."""
    traced = jax.jit(pick).trace(normal(2, 5, 3), jnp.zeros((2, 4), jnp.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products
    assert text.count('"stablehlo.gather"') == gathers
    if products:
        assert "HIGHEST" in text


# Moving.


def moves(batch=2, rows=6, outputs=5):
    """An index that names no row twice, two of its entries none at all, and its inverse."""
    rng = np.random.default_rng(2)
    index, inverse = np.full((batch, outputs), rows), np.full((batch, rows), outputs)
    for b in range(batch):
        taken = rng.permutation(outputs)[: outputs - 2]
        index[b, taken] = rng.permutation(rows)[: outputs - 2]
        inverse[b, index[b, taken]] = taken
    return jnp.asarray(index), jnp.asarray(inverse)


def test_move_is_pick_with_the_gradient_of_pick(form):
    """Gradients are copies of values, so JAX's own scatter gives them bit for bit."""
    x, gradient, (index, inverse) = normal(2, 6, 3), normal(2, 5, 3, seed=1), moves()
    expected, expected_pull = jax.vjp(lambda x: pick(x, index), x)
    found, pull = jax.vjp(lambda x: move(x, index, inverse), x)
    np.testing.assert_array_equal(found, expected)
    (x_gradient,) = pull(gradient)
    np.testing.assert_array_equal(x_gradient, expected_pull(gradient)[0])
    nowhere = np.asarray(inverse) == 5
    assert nowhere.sum() == 6 and (np.asarray(x_gradient)[nowhere] == 0).all()


def test_move_does_not_scatter():
    """The backward pass of `move` has no scatter; the one of `pick` does, so the count can fail."""
    x, (index, inverse) = normal(2, 6, 3), moves()
    text = [
        jax.jit(jax.grad(lambda x, f=f: jnp.square(f(x)).sum())).lower(x).as_text()
        for f in (lambda x: move(x, index, inverse), lambda x: pick(x, index))
    ]
    assert "scatter" not in text[0] and "scatter" in text[1]


# Convolution in windows.

ROWS, COLUMNS, CELL = 6, 9, 3  # a map of 2x3 cells


def visible_positions(batch=2, cells=3):
    """The positions of some cells of each sample, `[batch, rows]` of (row, column), cell by cell."""
    rng, found = np.random.default_rng(3), []
    for _ in range(batch):
        chosen = sorted(rng.permutation(6)[:cells])
        corners = [(c // 3 * CELL, c % 3 * CELL) for c in chosen]
        found.append([(r + i, c + j) for r, c in corners for i in range(CELL) for j in range(CELL)])
    assert found[0] != found[1]
    return found


def literal(x, kernel, positions):
    """The sum as a textbook has it, over the rows whose positions are near enough, in float64."""
    height, width, _ = kernel.shape
    y = np.zeros(x.shape)
    for b, sites in enumerate(positions):
        for n, (r, c) in enumerate(sites):
            for m, (row, column) in enumerate(sites):
                i, j = row - r + height // 2, column - c + width // 2
                if 0 <= i < height and 0 <= j < width:
                    y[b, n] += x[b, m] * kernel[i, j]
    return y


def windows(kind, kernel, positions):
    """The windows of a kernel, written out: one over the whole map, or one per cell."""
    height, width = kernel
    none = len(positions[0])
    around, out, back = [], [], []
    for sites in positions:
        index = {site: n for n, site in enumerate(sites)}
        corners, shape = ([(0, 0)], (ROWS, COLUMNS)) if kind == "map" else (sites[:: CELL**2], (CELL, CELL))
        around.append(
            [
                index.get((r + i - height // 2, c + j - width // 2), none)
                for r, c in corners
                for i in range(shape[0] + height - 1)
                for j in range(shape[1] + width - 1)
            ]
        )
        out.append([r * COLUMNS + c for r, c in sites])
        back.append([index.get((r, c), none) for r in range(ROWS) for c in range(COLUMNS)])
    if kind == "cells":
        return Windows(jnp.asarray(around), None, None, shape, kernel)
    return Windows(*map(jnp.asarray, (around, back, out)), shape, kernel)


@pytest.mark.parametrize("kernel", [(7, 7), (3, 5), (1, 1)])
@pytest.mark.parametrize("kind", ["map", "cells"])
def test_convolution_in_windows(kind, kernel, form, error):
    """Output and both gradients against the literal sum, of which they are exact differences, in float64."""
    positions = visible_positions()
    with jax.enable_x64(True):
        x = normal(2, len(positions[0]), 2, dtype=jnp.float64)
        k = normal(*kernel, 2, dtype=jnp.float64, seed=1)
        gradient = normal(*x.shape, dtype=jnp.float64, seed=2)

        def apply(x, k, gradient):
            y, pull = jax.vjp(
                lambda x, k: depthwise_conv_windows(x, k, windows(kind, kernel, positions)), x, k
            )
            return y, *pull(gradient)

        found = [np.array(a) for a in jax.jit(apply)(x, k, gradient)]
    x, k, gradient = (np.array(a) for a in (x, k, gradient))
    assert error(found[0], literal(x, k, positions)) < 1e-13
    # The sum is linear in each argument: its gradient is its value at ones, entry by entry.
    for array, result, other in ((x, found[1], False), (k, found[2], True)):
        expected = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            one = np.zeros(array.shape)
            one[index] = 1
            y = literal(x, one, positions) if other else literal(one, k, positions)
            expected[index] = (y * gradient).sum()
        assert error(result, expected) < 1e-12


def test_bfloat16_sums_are_float32(error):
    """Output and gradients are the float32 ones, rounded once."""
    positions = visible_positions()
    shape = windows("cells", (7, 7), positions)
    x, gradient = (normal(2, len(positions[0]), 4, seed=s).astype(jnp.bfloat16) for s in (0, 1))
    kernel = normal(7, 7, 4, seed=2).astype(jnp.bfloat16)

    def apply(x, k, gradient):
        y, pull = jax.vjp(lambda x, k: depthwise_conv_windows(x, k, shape), x, k)
        return y, *pull(gradient)

    found = jax.jit(apply)(x, kernel, gradient)
    expected = jax.jit(apply)(*(a.astype(jnp.float32) for a in (x, kernel, gradient)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.astype(jnp.float32) / scale, b / scale, rtol=2**-8, atol=1e-6)


def test_windows_are_a_pytree():
    """Index arrays are leaves; sizes are static, so they may not be traced."""
    some = windows("map", (7, 7), visible_positions())
    assert len(jax.tree.leaves(some)) == 3
    back = jax.jit(lambda w: w)(some)
    assert (back.shape, back.kernel) == (some.shape, some.kernel)
