"""Patches in their order, Masked against Dense, and Gathered against Masked."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models import Encoder, EncoderConfig
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.layouts import (
    MIN_WINDOW,
    Dense,
    Gathered,
    Layout,
    Masked,
    from_patches,
    patches_between,
    to_patches,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")


def hold(kind, masked, visible, scale):
    return kind.from_mask(masked, *([visible] if kind is Gathered else []), scale)


def positions(layout):
    """Rows and columns of the plain map."""
    return [side * layout.scale for side in layout.grid]


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
    np.testing.assert_array_equal(layout.rows()[0, :, 0], layout.visible.ravel())


def test_masked_hides_everything_hidden():
    visible = np.random.default_rng(0).random((2, 5, 6)) < 0.5
    layout = Masked(jnp.asarray(visible))
    x, kernel = normal(2, 5, 6, 3), normal(7, 7, 3)
    hidden_nan = jnp.where(visible[..., None], x, jnp.nan)
    held = jnp.where(visible[..., None], x, 0)
    np.testing.assert_array_equal(layout.leave(hidden_nan), held)
    np.testing.assert_array_equal(layout.enter(hidden_nan, 1), held)
    convolved = np.asarray(layout.depthwise(hidden_nan, kernel))
    assert (convolved[~visible] == 0).all()
    dense = np.asarray(Dense().depthwise(held, kernel))
    np.testing.assert_allclose(convolved[visible], dense[visible], rtol=1e-6)


NOTHING = jnp.zeros((2, 2, 3), bool)


@pytest.mark.parametrize("kind", [Masked, Gathered])
def test_encoder_with_nothing_hidden_is_dense(kind, build, error):
    encoder = build(Encoder, EncoderConfig((1, 1, 2, 1), (4, 6, 8, 10), patch_size=1))
    images = normal(2, 16, 24, 3)
    layouts = [hold(kind, NOTHING, 6, scale) for scale in (8, 4, 2, 1)]
    apply = jax.jit(lambda m, x, layouts: m.features(x, None, layouts))
    for a, b in zip(apply(encoder, images, layouts), apply(encoder, images, None), strict=True):
        assert error(a, b) < 1e-6


def test_block_with_nothing_hidden_is_dense(build, error):
    block = build(Block, 6, dtype=jnp.float32)
    x = normal(2, 4, 6, 6)

    def differentiate(layout):
        scalar = lambda m, x: jnp.sin(m(x, layout)).sum()  # noqa: E731
        return jax.jit(jax.grad(scalar, argnums=(0, 1)))(block, x)

    masked, dense = differentiate(Masked.from_mask(NOTHING, 2)), differentiate(Dense())
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(dense), strict=True):
        assert error(a, b) < 1e-5


# Gathered.

CELLS = {"5 of 3x4": (3, 4, 5), "1 of 5x2": (5, 2, 1), "all of 2x3": (2, 3, 6)}
SCALES = [("5 of 3x4", 1), ("5 of 3x4", 2), ("5 of 3x4", 4), ("5 of 3x4", 8)]
SCALES += [("1 of 5x2", 1), ("1 of 5x2", 4), ("all of 2x3", 2), ("all of 2x3", 4)]
PATCHES = [(*pair, patch) for pair, patch in zip(SCALES, (4, 2, 1, 4, 2, 4, 4, 1), strict=True)]


def some_mask(cells):
    """Three masks `[3, rows, columns]` with as many visible cells as the name says, True = hidden."""
    rows, columns, visible = CELLS[cells]
    rng = np.random.default_rng(rows)
    masked = np.ones((3, rows * columns), bool)
    for one in masked:
        one[rng.permutation(rows * columns)[:visible]] = False
    return jnp.asarray(masked.reshape(3, rows, columns))


@functools.cache
def layouts_of(cells, scale):
    """Both layouts of the same masks at the same scale."""
    make = lambda masked: tuple(hold(k, masked, CELLS[cells][2], scale) for k in (Masked, Gathered))  # noqa: E731
    return jax.jit(make)(some_mask(cells))


def visible_rows(x, masked, scale):
    """The visible positions of a plain map in the order of Gathered, by loops: cell, row, column."""
    samples = []
    for b, mask in enumerate(np.asarray(masked)):
        rows = [
            x[b, r * scale + i, c * scale + j]
            for r, c in np.argwhere(~mask)
            for i in range(scale)
            for j in range(scale)
        ]
        samples.append(np.stack(rows))
    return np.stack(samples)


@pytest.mark.parametrize(("cells", "scale"), SCALES)
def test_gathered_order(cells, scale):
    """Cell by cell in the order of the grid, rows and columns inside; no cell more than are visible."""
    masked, (_, layout) = some_mask(cells), layouts_of(cells, scale)
    rows, columns, visible = CELLS[cells]
    plain = np.arange(3 * rows * columns * scale**2, dtype=np.float32)
    plain = plain.reshape(3, rows * scale, columns * scale, 1)
    expected = visible_rows(plain, masked, scale)
    assert expected.shape[1] == visible * scale**2
    np.testing.assert_array_equal(jax.jit(lambda plain: layout.enter(plain, 1))(plain), expected)
    assert layout.rows() is None and layout.grid == (rows, columns)
    # The two index arrays are each other's inverse.
    index, inverse = np.asarray(layout.index), np.asarray(layout.inverse)
    for b in range(3):
        np.testing.assert_array_equal(inverse[b, index[b]], np.arange(index.shape[1]))
        assert (inverse[b] < index.shape[1]).sum() == index.shape[1]
        assert inverse[b].max() <= index.shape[1]


@pytest.mark.parametrize(("cells", "scale", "patch"), PATCHES)
def test_gathered_enters_and_leaves(cells, scale, patch):
    """Patches of an image are those of Masked, zero where nothing is visible; NaN there does not matter."""
    masked, gathered = layouts_of(cells, scale)
    height, width = positions(gathered)
    images = normal(3, height * patch, width * patch, 2)
    hidden = np.kron(~np.asarray(masked.visible), np.ones((patch, patch))) > 0
    poisoned = images.at[hidden].set(jnp.nan)
    weights = normal(3, height, width, 2 * patch**2, seed=1)

    @jax.jit
    def differentiate(layout, images):
        def scalar(images):
            rows = layout.enter(images, patch)
            left = layout.leave(jnp.sin(rows))
            return (weights * left).sum(), (rows, left)

        gradient, results = jax.grad(scalar, has_aux=True)(images)
        return *results, gradient

    rows, left, gradient = differentiate(gathered, poisoned)
    assert rows.shape == (3, CELLS[cells][2] * scale**2, 2 * patch**2)
    for a, b in zip((rows, left, gradient), differentiate(gathered, images), strict=True):
        np.testing.assert_array_equal(a, b)
    _, expected, expected_gradient = differentiate(masked, images)
    np.testing.assert_allclose(left, expected, rtol=1e-6)
    assert (np.asarray(left)[~np.asarray(masked.visible)] == 0).all()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-7)
    assert (np.asarray(gradient)[hidden] == 0).all() and jnp.abs(gradient).max() > 0


@pytest.mark.parametrize("kernel", [(7, 7), (3, 5)], ids=str)
@pytest.mark.parametrize(("cells", "scale"), SCALES)
def test_gathered_depthwise_is_masked_depthwise(cells, scale, kernel, error):
    """At visible positions, with the gradients in map and kernel; neighbours are visible ones only."""
    masked, gathered = layouts_of(cells, scale)
    size = (3, *positions(gathered), 2)
    plain, weights, gradient = normal(*size), normal(*kernel, 2, seed=1), normal(*size, seed=2)

    @jax.jit
    def differentiate(layout, plain, weights):
        y, pull = jax.vjp(lambda x, k: layout.leave(layout.depthwise(layout.enter(x, 1), k)), plain, weights)
        return y, *pull(gradient)

    found, expected = (differentiate(layout, plain, weights) for layout in (gathered, masked))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-6
    assert (np.asarray(found[0])[~np.asarray(masked.visible)] == 0).all()


def test_both_kinds_of_windows_are_tested():
    """Some scale above is convolved cell by cell and some as a whole map."""
    scales = (1, 2, 4, 8)
    apart = [layouts_of("5 of 3x4", s)[1]._windows((7, 7)).out is None for s in scales]
    assert apart == [s >= MIN_WINDOW for s in scales] and set(apart) == {True, False}


@pytest.mark.parametrize(("cells", "scale"), [s for s in SCALES if s[1] > 1])
def test_patches_between_layouts(cells, scale):
    """Whichever of the two holds the fine map and whichever the coarse one, the patches are the same."""
    fine, coarse = layouts_of(cells, scale), layouts_of(cells, scale // 2)
    plain = normal(3, *positions(fine[1]), 2)
    expected = coarse[0].leave(to_patches(plain, 2))
    assert jnp.abs(expected).max() > 0

    @jax.jit
    def cut(before, after):
        return after.leave(patches_between(before.enter(plain, 1), before, after))

    for before, after in itertools.product(fine, coarse):
        np.testing.assert_array_equal(cut(before, after), expected)


def test_layouts_are_layouts():
    """All three offer what blocks ask for, and pass through `jit` as arguments."""
    for layout in (Dense(), *layouts_of("5 of 3x4", 2)):
        assert isinstance(layout, Layout)
        assert type(jax.jit(lambda layout: layout)(layout)) is type(layout)
