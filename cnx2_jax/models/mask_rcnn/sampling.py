"""Draws a fixed number of positive and negative boxes, as mmdetection's RandomSampler does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key


class Sample(NamedTuple):
    """A drawn set of boxes: the positive ones first, then the negative ones, then empty places.

    Attributes:
      indices: which box is in each place; 0 in an empty one.
      positive: whether it is positive.
      valid: whether there is one.
    """

    indices: Int[Array, " s"]
    positive: Bool[Array, " s"]
    valid: Bool[Array, " s"]


def sample(
    key: Key[Array, ""],
    positive: Bool[Array, " n"],
    negative: Bool[Array, " n"],
    count: int,
    most_positive: int,
) -> Sample:
    """Draws at most `most_positive` positive boxes and fills up with negative ones, to at most `count`.

    Each box gets a uniform random number, and those with the largest are taken.

    Args:
      key: of the image; nothing else is random.
      positive, negative: what may be drawn; no box is both.
      count: places of the result.
      most_positive: at most `count`.
    """
    size = len(positive)
    draws = jax.random.uniform(key, (size,))
    found = [
        jax.lax.top_k(jnp.where(allowed, draws, -1), min(most, size))
        for allowed, most in ((positive, most_positive), (negative, count))
    ]
    drawn = jnp.concatenate([value >= 0 for value, _ in found])
    index = jnp.concatenate([index for _, index in found])
    order = jnp.argsort(~drawn, stable=True)[:count]
    missing = (0, count - len(order))
    valid = jnp.pad(drawn[order], missing)
    index = jnp.where(valid, jnp.pad(index[order], missing), 0)
    return Sample(index, jnp.arange(count) < (found[0][0] >= 0).sum(), valid)
