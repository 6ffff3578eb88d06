"""The inverted bottleneck of a block, from LayerNorm to the second linear layer, with its own gradient.

The gradient that JAX derives is bound by memory: it stores three tensors of the wide hidden layer per block
and computes eight sums over all positions. This one stores a single hidden tensor, recomputes GELU from it,
and folds most sums into matrix products that are needed anyway:

- LayerNorm's scale and bias fold into the first linear layer, GRN's bias into the second; their gradients
  are sums over weight gradients.
- If a sample has at least as many positions as channels, GRN's scale (one factor per sample and hidden
  channel) folds into a copy of the second layer's weights per sample. The product of hidden layer and output
  gradient per sample then yields both the weights' gradient and GRN's.

`Block.reference` (models/convnextv2.py) is the plain form; the tests hold the two equal.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from cnx2_jax.kernels.pointwise import EPSILON, statistics, statistics_gradient, widened


class Weights(NamedTuple):
    """Parameters of the bottleneck, float32 or wider; C channels in and out, K hidden ones."""

    norm_scale: Float[Array, " c"]
    norm_bias: Float[Array, " c"]
    kernel1: Float[Array, "c k"]
    bias1: Float[Array, " k"]
    gamma: Float[Array, " k"]
    beta: Float[Array, " k"]
    kernel2: Float[Array, "k c"]
    bias2: Float[Array, " c"]


@jax.custom_vjp
def inverted_bottleneck(
    x: Float[Array, "b n c"], visible: Bool[Array, "b n 1"] | None, weights: Weights
) -> Float[Array, "b n c"]:
    """LayerNorm -> Linear -> GELU (exact) -> GRN -> Linear (paper, figure 5).

    Args:
      x: `[B, N, C]`, the positions of each sample in the compute dtype. Matrix products use this dtype,
        statistics and sums float32 or wider.
      visible: the positions that GRN sums over; None for all. The result at other positions is arbitrary and
        must not be used.
      weights: the parameters.

    Returns:
      `[B, N, C]` in the dtype of `x`.
    """
    return _forward(x, visible, weights)[0]


def _forward(x, visible, weights):
    normal, inverse = statistics(x)
    normal = normal.astype(x.dtype)
    raw = normal @ _kernel1(weights, x.dtype)

    hidden, _ = _gelu(raw, weights)
    norm = jnp.sqrt(_only(visible, jnp.square(hidden)).sum(axis=1) + EPSILON)
    scale = 1 + weights.gamma * (norm / _mean(norm))
    operands = _scaled(hidden, scale, weights.kernel2, x.dtype)
    indices = "bnk,bkc->bnc" if operands[1].ndim == 3 else "bnk,kc->bnc"
    offset = weights.beta @ weights.kernel2 + weights.bias2
    y = jnp.einsum(indices, *operands) + offset.astype(x.dtype)
    return y, (normal, inverse, raw, norm, visible, weights)


def _backward(residuals, gradient):
    normal, inverse, raw, norm, visible, weights = residuals
    dtype = normal.dtype
    hidden, slope = _gelu(raw, weights)
    mean = _mean(norm)
    response = norm / mean
    scale = 1 + weights.gamma * response
    scaled, kernel2 = _scaled(hidden, scale, weights.kernel2, dtype)

    # The second layer. `to_factor` [B, K] is the gradient of GRN's factor.
    if kernel2.ndim == 3:
        products = _product("bnk,bnc->bkc", scaled, gradient)
        to_kernel2 = jnp.einsum("bk,bkc->kc", scale, products)
        to_factor = jnp.einsum("kc,bkc->bk", weights.kernel2, products)
        to_hidden = widened(jnp.einsum("bnc,bkc->bnk", gradient, kernel2))
    else:
        to_kernel2 = _product("bnk,bnc->kc", scaled, gradient)
        unscaled = widened(jnp.einsum("bnc,kc->bnk", gradient, kernel2))
        to_factor = (hidden * unscaled).sum(axis=1)
        to_hidden = unscaled * scale[:, None]
    to_bias2 = widened(gradient).sum(axis=(0, 1))
    to_kernel2 += weights.beta[:, None] * to_bias2
    to_beta = weights.kernel2 @ to_bias2

    # GRN: the response is the norm divided by its mean; the norm is the root of a sum of squares.
    to_gamma = (response * to_factor).sum(axis=0)
    to_response = to_factor * weights.gamma
    to_norm = (to_response - (to_response * response).mean(axis=-1, keepdims=True)) / mean
    to_hidden += _only(visible, (to_norm / norm)[:, None] * hidden)

    # GELU and the first layer.
    to_raw = (to_hidden * slope).astype(dtype)
    product = _product("bnc,bnk->ck", normal, to_raw)
    to_bias1 = widened(to_raw).sum(axis=(0, 1))
    to_kernel1 = weights.norm_scale[:, None] * product + weights.norm_bias[:, None] * to_bias1

    # LayerNorm.
    to_norm_scale = (weights.kernel1 * product).sum(axis=1)
    to_norm_bias = weights.kernel1 @ to_bias1
    to_normal = widened(to_raw @ _kernel1(weights, dtype).T)
    to_x = statistics_gradient(to_normal, widened(normal), inverse)
    to_weights = Weights(
        to_norm_scale, to_norm_bias, to_kernel1, to_bias1, to_gamma, to_beta, to_kernel2, to_bias2
    )
    to_weights = jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), to_weights, weights)
    return to_x.astype(dtype), None, to_weights


inverted_bottleneck.defvjp(_forward, _backward)


def _kernel1(weights: Weights, dtype) -> Array:
    return (weights.norm_scale[:, None] * weights.kernel1).astype(dtype)


def _gelu(raw: Array, weights: Weights) -> tuple[Array, Array]:
    """Returns GELU of the first layer's output, and GELU's derivative; `raw` lacks the layer's bias."""
    x = widened(raw) + (weights.bias1 + weights.norm_bias @ weights.kernel1)
    cumulative = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cumulative, cumulative + x * density


def _only(visible: Array | None, x: Array) -> Array:
    return x if visible is None else jnp.where(visible, x, 0)


def _mean(norm: Array) -> Array:
    return norm.mean(axis=-1, keepdims=True) + EPSILON


def _scaled(hidden: Array, scale: Array, kernel2: Array, dtype) -> tuple[Array, Array]:
    """Returns the second layer's operands: hidden `[B, N, K]` and kernel `[K, C]`, or folded `[B, K, C]`."""
    if hidden.shape[1] >= kernel2.shape[1]:  # copies of the kernel are smaller than the hidden layer
        return hidden.astype(dtype), (scale[:, :, None] * kernel2).astype(dtype)
    return (hidden * scale[:, None]).astype(dtype), kernel2.astype(dtype)


def _product(indices: str, *operands: Array) -> Array:
    wide = jnp.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(indices, *operands, preferred_element_type=wide)
