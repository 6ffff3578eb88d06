"""The core of LayerNorm, in forms that XLA compiles well."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-6  # LayerNorm and GRN, everywhere (official convnextv2.py, utils.py)


def widened(x: Array) -> Array:
    """Casts to float32 unless already wider, for statistics and sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def mean_channels(x: Float[Array, "*any c"]) -> Float[Array, "*any 1"]:
    """Returns the mean over the last axis, which is kept with size 1.

    On CPUs this is a matrix product, because XLA would compute `x` twice: fused into the reduction, and again
    into whatever uses the mean.
    """

    def by_product(x):
        return x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype)

    return lax.platform_dependent(x, cpu=by_product, default=lambda x: x.mean(axis=-1, keepdims=True))


def statistics(x: Float[Array, "*any c"]) -> tuple[Float[Array, "*any c"], Float[Array, "*any 1"]]:
    """Returns `x` normalised over its channels, and the inverse standard deviation; float32 or wider."""
    wide = widened(x)
    centred = wide - mean_channels(wide)
    inverse = lax.rsqrt(mean_channels(jnp.square(centred)) + EPSILON)
    return centred * inverse, inverse


def statistics_gradient(
    gradient: Float[Array, "*any c"], normal: Float[Array, "*any c"], inverse: Float[Array, "*any 1"]
) -> Float[Array, "*any c"]:
    """Returns the gradient in `x` of `statistics(x)[0]`, given its outputs; all are float32 or wider."""
    along = mean_channels(gradient * normal)
    return (gradient - mean_channels(gradient) - normal * along) * inverse


@jax.custom_vjp
def standardise(x: Float[Array, "*any c"]) -> Float[Array, "*any c"]:
    """Normalises every position to mean 0 and variance 1 over its channels, in float32 or wider."""
    return statistics(x)[0]


def _forward(x):
    normal, inverse = statistics(x)
    return normal, (normal.astype(x.dtype), inverse)


def _backward(residuals, gradient):
    normal, inverse = residuals
    return (statistics_gradient(gradient, widened(normal), inverse).astype(normal.dtype),)


standardise.defvjp(_forward, _backward)
