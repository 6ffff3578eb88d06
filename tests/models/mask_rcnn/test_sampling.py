"""The draw of positive and negative boxes against a loop that is given the same random numbers."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cnx2_jax.models.mask_rcnn.sampling import sample

pytestmark = pytest.mark.usefixtures("compile_quickly")

COUNT, MOST = 8, 3
draw = jax.jit(functools.partial(sample, count=COUNT, most_positive=MOST))


def literal(draws, positive, negative):
    """Picks the largest random numbers one by one."""
    pools = [[i for i in range(len(draws)) if allowed[i]] for allowed in (positive, negative)]
    chosen = [], []
    for pool, picked, most in zip(pools, chosen, (MOST, COUNT), strict=True):
        while pool and len(picked) < most and len(chosen[0]) + len(chosen[1]) < COUNT:
            best = max(pool, key=lambda i: draws[i])
            pool.remove(best)
            picked.append(best)
    return chosen


@pytest.mark.parametrize("size", [20, 5])  # fewer boxes than places too
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), data=st.data())
def test_draw(size, seed, data):
    kinds = data.draw(arrays(np.int8, size, elements=st.integers(0, 2)))
    key = jax.random.key(seed)
    found = jax.tree.map(np.asarray, draw(key, kinds == 1, kinds == 2))
    positive, negative = literal(np.asarray(jax.random.uniform(key, (size,))), kinds == 1, kinds == 2)
    total = len(positive) + len(negative)
    np.testing.assert_array_equal(found.indices, [*positive, *negative] + [0] * (COUNT - total))
    np.testing.assert_array_equal(found.positive, np.arange(COUNT) < len(positive))
    np.testing.assert_array_equal(found.valid, np.arange(COUNT) < total)


def test_draws_are_uniform():
    """Every positive box is drawn equally often, and every negative one."""
    positive = np.arange(24) % 2 == 0
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.jit(jax.vmap(lambda key: draw(key, positive, ~positive)))(keys)
    counts = np.bincount(np.asarray(found.indices).ravel(), minlength=24) / len(keys)
    assert np.asarray(found.valid).all()
    np.testing.assert_allclose(counts[positive], MOST / 12, atol=0.03)
    np.testing.assert_allclose(counts[~positive], (COUNT - MOST) / 12, atol=0.035)


def test_a_draw_depends_on_its_own_key_only():
    """Alone or in a batch, an image gets the same boxes."""
    keys = jax.random.split(jax.random.key(1), 3)
    kinds = np.random.default_rng(0).integers(0, 3, (3, 20))
    together = jax.vmap(draw)(keys, kinds == 1, kinds == 2)
    alone = draw(keys[2], kinds[2] == 1, kinds[2] == 2)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[2], b)
