"""Per-position operations whose default form XLA compiles badly."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Exact GELU, x times the normal distribution's cumulative function; computed in float32 at least.

    The gradient recomputes the function from `x`, so that `x` is all that is kept for it, and uses erf in
    both directions: `jax.nn.gelu` goes through erfc, whose pieces and gradient cost twice as much on CPU.
    """
    wide = _widened(x)
    return (wide * _cumulative(wide)).astype(x.dtype)


def _forward(x):
    return gelu(x), x


def _backward(x, gradient):
    wide = _widened(x)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((gradient * (_cumulative(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(_forward, _backward)


def mean_channels(x: Float[Array, "*any c"]) -> Float[Array, "*any 1"]:
    """Means over the last axis, which stays with size 1.

    On CPU as a matrix product: XLA would fuse whatever made `x` into the reduction and once more into what
    uses the mean, and after a depthwise convolution that repeats all its multiply-adds.
    """

    def by_product(x):
        return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)

    return lax.platform_dependent(x, cpu=by_product, default=lambda x: x.mean(axis=-1, keepdims=True))


def _widened(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _cumulative(x: Array) -> Array:
    return 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
