"""Weighted sums: what losses and metrics are before they are divided."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Term(NamedTuple):
    """A sum over samples, pixels or boxes, and the weight that it is to be divided by.

    Sums and weights add up over devices and accumulation parts, means do not: what is divided is the sum over
    the global batch, by the weight of the global batch.

    Attributes:
      sum: float32 scalar.
      weight: float32 scalar, not negative. No gradient flows through it.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]


Terms = Mapping[str, Term]


def mean_of(values: Array, valid: Bool[Array, "..."] | None = None) -> Term:
    """Returns the term whose value is the mean of `values`, or of those where `valid` is true."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if valid is None:
        return Term(values.sum(), jnp.asarray(values.size, values.dtype))
    return Term(jnp.where(valid, values, 0).sum(), valid.sum().astype(values.dtype))


def inverse(weight: jax.Array) -> jax.Array:
    """Returns 1 / weight, and 0 for a weight of 0: a term without anything in it is 0, not NaN."""
    return jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)


def value(term: Term) -> jax.Array:
    """Returns sum / weight, and 0 for a weight of 0."""
    return jnp.where(term.weight > 0, term.sum / jnp.where(term.weight > 0, term.weight, 1), 0)
