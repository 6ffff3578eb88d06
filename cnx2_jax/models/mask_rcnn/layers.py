"""Layers of the neck and the heads: convolutions with a bias, and fully connected ones on whole regions."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnx2_jax.kernels.convolution import conv

Initializer = nnx.initializers.Initializer

# mmcv's ConvModule: `kaiming_init` with fan_out and ReLU's gain.
kaiming: Initializer = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
xavier: Initializer = nnx.initializers.xavier_uniform()


class Conv(nnx.Module):
    """A convolution with a bias that keeps the map's size; the kernel is `[size, size, in, out]`."""

    def __init__(
        self, size: int, features_in: int, features_out: int, initial: Initializer, *, dtype, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(initial(rngs.params(), (size, size, features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        kernel = self.kernel[...].astype(self.dtype)
        x = x.astype(self.dtype)
        y = x @ kernel[0, 0] if kernel.shape[:2] == (1, 1) else conv(x, kernel)
        return y + self.bias[...].astype(self.dtype)


class ConvModule(nnx.Module):
    """A convolution under the name that mmcv's module of convolution, norm and activation gives it."""

    def __init__(
        self, size: int, features_in: int, features_out: int, initial: Initializer, *, dtype, rngs: nnx.Rngs
    ):
        self.conv = Conv(size, features_in, features_out, initial, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """A 2x2 transposed convolution of stride 2; the kernel is `[2, 2, in, out]`."""

    def __init__(self, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        # PyTorch takes the input's features for fan_out here.
        initial = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = nnx.Param(initial(rngs.params(), (2, 2, features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b height width o"]:
        batch, height, width, _ = x.shape
        cells = jnp.einsum("bhwi,pqio->bhpwqo", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return cells.reshape(batch, 2 * height, 2 * width, -1) + self.bias[...].astype(self.dtype)


class FullyConnected(nnx.Module):
    """A product over all of `shape`, the last axes of the input; the kernel is `[*shape, out]`."""

    def __init__(
        self, shape: tuple[int, ...], features_out: int, initial: Initializer, *, dtype, rngs: nnx.Rngs
    ):
        flat = initial(rngs.params(), (math.prod(shape), features_out))
        self.kernel = nnx.Param(flat.reshape(*shape, features_out))
        self.bias = nnx.Param(jnp.zeros(features_out))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... o"]:
        kernel = self.kernel[...].astype(self.dtype)
        axes = kernel.ndim - 1
        return jnp.tensordot(x.astype(self.dtype), kernel, axes) + self.bias[...].astype(self.dtype)
