"""The layers of a ConvNeXt V2 block.

Parameters are float32. Every layer computes in its `dtype`; statistics and sums are taken in float32 at
least. Kernels are `[..., in, out]` and follow the official modules' names.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cnx2_jax.kernels.pointwise import EPSILON, standardise, widened
from cnx2_jax.models.layouts import Layout


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
        x = standardise(x.astype(self.dtype))
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
    channel that is zero everywhere is NaN. A Block takes this layer's parameters and computes it together
    with its neighbours (kernels/bottleneck.py).
    """

    def __init__(self, features: int, *, dtype):
        self.gamma = nnx.Param(jnp.zeros(features))
        self.beta = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "b *positions c"], visible: Bool[Array, "b *positions 1"] | None = None
    ) -> Float[Array, "b *positions c"]:
        """Normalises; `visible` says which positions the sums are taken over, all by default."""
        wide = widened(x.astype(self.dtype))
        squares = jnp.square(wide) if visible is None else jnp.where(visible, jnp.square(wide), 0)
        norm = jnp.sqrt(squares.sum(axis=tuple(range(1, x.ndim - 1)), keepdims=True) + EPSILON)
        norm = norm / (norm.mean(axis=-1, keepdims=True) + EPSILON)
        return (wide * (1 + self.gamma[...] * norm) + self.beta[...]).astype(self.dtype)


def stochastic_depth(keys: Key[Array, " b"], rates: Sequence[float]) -> Float[Array, "blocks b"]:
    """Draws the factor on each block's residual branch, 0 or 1 / (1 - rate), per sample.

    A draw depends on the sample's key and the block's index alone, so one key per sample serves the network.
    """
    keep = 1 - jnp.asarray(rates, jnp.float32)

    def draw(index, keep):
        return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), keep))(keys) / keep

    return jax.vmap(draw)(jnp.arange(len(keep)), keep)
