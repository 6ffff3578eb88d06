"""The layers of a ConvNeXt V2 block.

Parameters are float32. Every layer computes in its `dtype`; statistics and sums are taken in float32 at
least. Kernels are `[..., in, out]` and follow the official modules' names.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cnx2_jax.kernels.pointwise import mean_channels
from cnx2_jax.models.layouts import Layout

EPSILON = 1e-6  # LayerNorm and GRN, everywhere (official convnextv2.py, utils.py)


def normal_init(stddev: float = 0.02) -> nnx.initializers.Initializer:
    """Normal cut at +-2 in absolute units, as `torch.nn.init.trunc_normal_` does; not at 2 stddev."""
    return nnx.initializers.truncated_normal(stddev, lower=-2 / stddev, upper=2 / stddev)


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis."""

    def __init__(self, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal_init()(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*any i"]) -> Float[Array, "*any o"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return x.astype(self.dtype) @ kernel + bias


class PatchConv(nnx.Module):
    """A convolution whose stride is its kernel size, over patches that a layout has cut.

    The kernel is `[size, size, in, out]`, so a matrix product over the flattened patch is the convolution.
    """

    def __init__(self, size: int, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        shape = (size, size, features_in, features_out)
        self.kernel = nnx.Param(normal_init()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.dtype = dtype

    def __call__(self, patches: Float[Array, "*any patch"]) -> Float[Array, "*any o"]:
        kernel = self.kernel[...]
        kernel = kernel.reshape(-1, kernel.shape[-1]).astype(self.dtype)
        return patches.astype(self.dtype) @ kernel + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises each position over its channels; mean and variance in float32."""

    def __init__(self, features: int, *, dtype):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*any c"]) -> Float[Array, "*any c"]:
        x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        x = x - mean_channels(x)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)
        return (x * self.scale[...] + self.bias[...]).astype(self.dtype)


class DepthwiseConv(nnx.Module):
    """One `[size, size]` kernel per channel, over the neighbours that the layout lets it see."""

    def __init__(self, size: int, features: int, *, dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal_init()(rngs.params(), (size, size, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*any c"], layout: Layout) -> Float[Array, "*any c"]:
        y = layout.depthwise(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)


class GRN(nnx.Module):
    """Global response normalisation (paper, section 4 and algorithm 1), per sample.

    G = sqrt(sum over visible positions of x^2); N = G / mean over channels of G;
    out = gamma * (x * N) + beta + x. The epsilon inside the root is ours: without it the gradient of a
    channel that is zero everywhere is NaN.
    """

    def __init__(self, features: int, *, dtype):
        self.gamma = nnx.Param(jnp.zeros(features))
        self.beta = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*any c"], layout: Layout) -> Float[Array, "*any c"]:
        wide = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        norm = jnp.sqrt(layout.sum_positions(jnp.square(wide)) + EPSILON)
        norm = norm / (norm.mean(axis=-1, keepdims=True) + EPSILON)
        return (wide * (1 + self.gamma[...] * norm) + self.beta[...]).astype(self.dtype)


class DropPath(nnx.Module):
    """Stochastic depth: drops a residual branch for whole samples, one draw per sample and block.

    `index` tells blocks apart, so that one key per sample serves the whole network.
    """

    def __init__(self, rate: float, index: int):
        self.rate = rate
        self.index = index

    def __call__(self, x: Float[Array, "b *any"], keys: Key[Array, " b"] | None) -> Float[Array, "b *any"]:
        if keys is None or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, self.index), keep))(keys)
        kept = kept.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, x / keep, 0)
