"""The layers that models are made of.

Parameters are float32. Every layer computes in its `dtype`; statistics and sums are computed in float32 or
wider. Kernels are `[..., in, out]`; parameter names follow the official modules.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cnx2_jax.kernels.pointwise import EPSILON, standardise, widened
from cnx2_jax.models.layouts import Layout

BATCH_NORM_EPSILON = 1e-5  # PyTorch's default


def normal_init(stddev: float = 0.02) -> nnx.initializers.Initializer:
    """Returns a normal initialiser cut at +-2, like `torch.nn.init.trunc_normal_`; not at 2 `stddev`."""
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
    """A convolution whose stride equals its kernel size, over patches that a layout has cut.

    The kernel is `[size, size, in, out]`, so the convolution is a matrix product over the flattened patch.
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
    out = gamma * (x * N) + beta + x. An epsilon is added inside the root, as in the authors' JAX code
    (TRAINING.md); their PyTorch code has none, and there the gradient of a channel that is zero everywhere is
    NaN. A Block fuses this layer with its neighbours (kernels/bottleneck.py) and only takes its parameters.
    """

    def __init__(self, features: int, *, dtype):
        self.gamma = nnx.Param(jnp.zeros(features))
        self.beta = nnx.Param(jnp.zeros(features))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "b *positions c"], visible: Bool[Array, "b *positions 1"] | None = None
    ) -> Float[Array, "b *positions c"]:
        """Normalises `x`, summing over the positions that are True in `visible`; by default over all."""
        wide = widened(x.astype(self.dtype))
        squares = jnp.square(wide) if visible is None else jnp.where(visible, jnp.square(wide), 0)
        norm = jnp.sqrt(squares.sum(axis=tuple(range(1, x.ndim - 1)), keepdims=True) + EPSILON)
        norm = norm / (norm.mean(axis=-1, keepdims=True) + EPSILON)
        return (wide * (1 + self.gamma[...] * norm) + self.beta[...]).astype(self.dtype)


class BatchNorm(nnx.Module):
    """Normalises each channel over the batch and all positions, with the semantics of `torch.nn.BatchNorm2d`.

    Training normalises with the statistics of the global batch: inside `shard_map` they are reduced over all
    manual mesh axes, over which the batch is assumed to be split; elsewhere arrays are global already. The
    variance is biased (divided by N) for normalising and unbiased (N - 1) in the running average.
    With gradient accumulation the statistics are those of each part of the batch.

    Args:
      features: channels.
      dtype: of the result; statistics are float32 or wider.
      momentum: weight of the new batch in the running averages.
      epsilon: added to the variance inside the root.

    Attributes:
      scale, bias: trainable parameters.
      mean, var: running averages, updated in place by a call with `train=True`.
    """

    def __init__(self, features: int, *, dtype, momentum: float = 0.1, epsilon: float = BATCH_NORM_EPSILON):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.dtype = dtype
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b *positions c"], train: bool) -> Float[Array, "b *positions c"]:
        """Returns `x` normalised: by its own statistics in training, else by the running averages.

        Raises:
          ValueError: in training, a channel has one value in the global batch, whose variance is undefined.
        """
        wide = widened(x)
        mean, var = self._batch_statistics(wide) if train else (self.mean[...], self.var[...])
        normal = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
        return (normal * self.scale[...] + self.bias[...]).astype(self.dtype)

    def _batch_statistics(self, wide: Array) -> tuple[Array, Array]:
        """Returns mean and biased variance of the global batch, and updates the running averages."""
        shards = jax.sharding.get_abstract_mesh().manual_axes  # empty outside of shard_map
        axes = tuple(range(wide.ndim - 1))
        count = math.prod(wide.shape[:-1]) * jax.lax.axis_size(shards)
        if count < 2:
            raise ValueError(
                "BatchNorm needs more than one value per channel in training: use a larger batch or image"
            )
        mean = jax.lax.psum(wide.sum(axis=axes), shards) / count
        var = jax.lax.psum(jnp.square(wide - mean).sum(axis=axes), shards) / count
        for average, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            new = jax.lax.stop_gradient(new).astype(average.dtype)
            average[...] = (1 - self.momentum) * average[...] + self.momentum * new
        return mean, var


def stochastic_depth(keys: Key[Array, " b"], rates: Sequence[float]) -> Float[Array, "blocks b"]:
    """Draws the factor on each block's residual branch per sample, 0 or 1 / (1 - rate).

    Each draw depends on the sample's key and the block's index only, so one key per sample is enough.
    """
    keep = 1 - jnp.asarray(rates, jnp.float32)

    def draw(index, keep):
        return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, index), keep))(keys) / keep

    return jax.vmap(draw)(jnp.arange(len(keep)), keep)


def dropout_channels(
    x: Float[Array, "b *positions c"], keys: Key[Array, " b"], rate: float, stream: int
) -> Float[Array, "b *positions c"]:
    """Sets each channel of each sample to zero with probability `rate`, and scales the others up.

    Like `torch.nn.Dropout2d`, it drops a channel at all positions. Each draw depends on the sample's key and
    the number `stream` only, which tells the layers of a model apart.
    """

    def draw(key):
        return jax.random.bernoulli(jax.random.fold_in(key, stream), 1 - rate, x.shape[-1:])

    factors = (jax.vmap(draw)(keys) / (1 - rate)).astype(x.dtype)
    return x * factors.reshape(len(x), *[1] * (x.ndim - 2), -1)
