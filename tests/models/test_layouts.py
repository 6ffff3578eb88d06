"""Patches in their order, and Masked against Dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models import Encoder
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.layers import DropPath
from cnx2_jax.models.layouts import Dense, Masked, from_patches, to_patches


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patch_order(patch):
    """Row in patch, column in patch, channel."""
    x = np.arange(2 * 6 * 12 * 5).reshape(2, 6, 12, 5).astype(np.float32)
    found = to_patches(jnp.asarray(x), patch)
    assert found.shape == (2, 6 // patch, 12 // patch, patch * patch * 5)
    stored = np.asarray(found)
    for b, r, c in np.ndindex(found.shape[:3]):
        vector = [
            x[b, r * patch + i, c * patch + j, channel]
            for i in range(patch)
            for j in range(patch)
            for channel in range(5)
        ]
        np.testing.assert_array_equal(stored[b, r, c], vector)
    np.testing.assert_array_equal(from_patches(found, patch), x)
    np.testing.assert_array_equal(Dense().enter(jnp.asarray(x), patch), found)


def test_mask_is_enlarged_cell_by_cell():
    masked = np.array([[[True, False, True], [False, False, True]]])
    layout = Masked.from_mask(jnp.asarray(masked), 4)
    assert layout.visible.shape == (1, 8, 12)
    for r in range(8):
        for c in range(12):
            assert layout.visible[0, r, c] == (not masked[0, r // 4, c // 4])
    np.testing.assert_array_equal(layout.coarser().coarser().visible, ~masked)


def test_masked_hides_everything_hidden():
    visible = np.random.default_rng(0).random((2, 5, 6)) < 0.5
    layout = Masked(jnp.asarray(visible))
    x, kernel = normal(2, 5, 6, 3), normal(7, 7, 3)
    hidden_nan = jnp.where(visible[..., None], x, jnp.nan)
    held = jnp.where(visible[..., None], x, 0)
    np.testing.assert_array_equal(layout.leave(hidden_nan), held)
    np.testing.assert_array_equal(layout.enter(hidden_nan, 1), held)
    np.testing.assert_allclose(layout.sum_positions(hidden_nan)[:, 0, 0], held.sum(axis=(1, 2)), rtol=1e-5)
    convolved = np.asarray(layout.depthwise(hidden_nan, kernel))
    assert (convolved[~visible] == 0).all()
    dense = np.asarray(Dense().depthwise(held, kernel))
    np.testing.assert_allclose(convolved[visible], dense[visible], rtol=1e-6)


NOTHING = jnp.zeros((2, 2, 3), bool)


def test_encoder_with_nothing_hidden_is_dense(build, error):
    encoder = build(Encoder, (1, 1, 2, 1), (4, 6, 8, 10), patch_size=1)
    images = normal(2, 16, 24, 3)
    masked = jax.jit(lambda m, x: m.features(x, None, Masked.from_mask(NOTHING, 8)))
    dense = jax.jit(lambda m, x: m.features(x))
    for a, b in zip(masked(encoder, images), dense(encoder, images), strict=True):
        assert error(a, b) < 1e-6


def test_block_with_nothing_hidden_is_dense(build, error):
    block = build(Block, 6, drop_path=DropPath(0.0, 0), dtype=jnp.float32)
    x = normal(2, 4, 6, 6)

    def differentiate(layout):
        scalar = lambda m, x: jnp.sin(m(x, layout)).sum()  # noqa: E731
        return jax.jit(jax.grad(scalar, argnums=(0, 1)))(block, x)

    masked, dense = differentiate(Masked.from_mask(NOTHING, 2)), differentiate(Dense())
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(dense), strict=True):
        assert error(a, b) < 1e-5
