"""Depthwise convolution: one function, the fastest form for each platform.

XLA's CPU backend runs a 7x7 grouped convolution 15 to 30 times slower than the same sum written as shifted
multiply-adds, which it fuses into one vectorised loop; TPUs and GPUs have native operations for it. The form
is chosen at lowering, so one traced program serves every platform.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]

# For the weights' gradient of 7x7 maps of 1024 channels cuDNN takes 14 times as long as a matrix product per
# channel on an H100, and 148 times for 4x4 outputs (docs/performance.md).
_SMALL = 49  # outputs per channel


@jax.custom_vjp
def depthwise_conv(x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]) -> Float[Array, "b h w c"]:
    """Cross-correlates every channel with its own kernel, stride 1, zero padding to the same size.

    Args:
      x: `[B, H, W, C]` in any floating dtype.
      kernel: `[KH, KW, C]` of the same dtype. If a size is even, one more row is padded below than above, as
        in XLA's "SAME".

    Returns:
      `[B, H, W, C]` in the dtype of `x`. The output and both gradients accumulate in float32 or wider.
    """
    return convolve(x, kernel, same_pads(kernel.shape))


def _forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    # The input's gradient is the same operation with the kernel flipped and the padding's sides swapped.
    pads = same_pads(kernel.shape)
    (top, bottom), (left, right) = pads
    x_gradient = convolve(gradient, kernel[::-1, ::-1], ((bottom, top), (right, left)))
    return x_gradient, kernel_gradient(x, gradient, pads).astype(kernel.dtype)


depthwise_conv.defvjp(_forward, _backward)


def same_pads(size: tuple[int, ...]) -> Pads:
    """Returns the padding, ((top, bottom), (left, right)), that keeps the size; `size` starts KH, KW."""
    height, width = size[:2]
    return (((height - 1) // 2, height // 2), ((width - 1) // 2, width // 2))


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"], pads: Pads
) -> Float[Array, "b oh ow c"]:
    """Cross-correlates a map after padding it with zeros; not differentiable on every platform."""
    return lax.platform_dependent(
        x, kernel, cpu=partial(_shifts_once, pads=pads), default=partial(native, pads=pads)
    )


def kernel_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b oh ow c"], pads: Pads
) -> Float[Array, "kh kw c"]:
    """Returns the gradient of `convolve` with respect to its kernel, in float32 or wider."""
    small = gradient.shape[1] * gradient.shape[2] <= _SMALL
    return lax.platform_dependent(
        x,
        gradient,
        cpu=partial(_kernel_gradient_by_rows, pads=pads),
        cuda=partial(_kernel_gradient_product if small else native_kernel_gradient, pads=pads),
        default=partial(native_kernel_gradient, pads=pads),
    )


def _padded(x: Array, pads: Pads) -> Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def native(x: Array, kernel: Array, pads: Pads) -> Array:
    """`convolve` by XLA's operation."""
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding=pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@partial(jax.jit, static_argnames="pads")  # traced once for each set of shapes
def _shifts_once(x: Array, kernel: Array, pads: Pads) -> Array:
    """Computes the shifts once, although XLA would repeat them in every operation that uses the result.

    The CPU backend fuses a sum of shifts, being elementwise, into each of its consumers (LayerNorm and its
    gradient alone are seven), and drops optimization barriers before that. It does not fuse across a
    conditional with an outcome unknown at compile time. If the kernel's first value is NaN, so is the result.
    """
    padded = _padded(x, pads)
    shape = jax.eval_shape(_shifts, padded, kernel)
    known = kernel[0, 0, 0] == kernel[0, 0, 0]
    return lax.cond(known, _shifts, lambda *_: jnp.full(shape.shape, jnp.nan, shape.dtype), padded, kernel)


def _shifts(padded: Array, kernel: Array) -> Array:
    # By lax: tracing a jnp function takes far longer than an operation, and there are five for each tap.
    batch, height, width, channels = padded.shape
    rows, columns, _ = kernel.shape
    shape = (batch, height - rows + 1, width - columns + 1, channels)
    dtype = _accumulator(padded)
    kernel = lax.convert_element_type(kernel, dtype)
    total = lax.full(shape, 0, dtype)
    for row in range(rows):
        for column in range(columns):
            start = (0, row, column, 0)
            window = lax.slice(padded, start, (batch, row + shape[1], column + shape[2], channels))
            tap = lax.slice(kernel, (row, column, 0), (row + 1, column + 1, channels))
            factor = lax.broadcast_in_dim(tap, shape, (1, 2, 3))
            total = lax.add(total, lax.mul(lax.convert_element_type(window, dtype), factor))
    return lax.convert_element_type(total, padded.dtype)


def native_kernel_gradient(x: Array, gradient: Array, pads: Pads) -> Array:
    """`kernel_gradient` by XLA's operation."""
    size = [
        side + sum(pad) - out + 1
        for side, pad, out in zip(x.shape[1:3], pads, gradient.shape[1:3], strict=True)
    ]
    kernel = jnp.zeros((*size, x.shape[-1]), x.dtype)
    (found,) = jax.linear_transpose(lambda k: native(x, k, pads), kernel)(gradient)
    return found.astype(_accumulator(x))  # the dtype of the CPU's form


def _kernel_gradient_product(x: Array, gradient: Array, pads: Pads) -> Array:
    """Multiplies every input of a channel by every output's gradient, then adds up the pairs of each tap."""
    inputs, outputs = x.shape[1:3], gradient.shape[1:3]
    dtype = _accumulator(x)
    pairs = jnp.einsum(
        "bic,bjc->cij",
        x.reshape(len(x), -1, x.shape[-1]),
        gradient.reshape(len(gradient), -1, gradient.shape[-1]),
        preferred_element_type=dtype,
        precision=lax.Precision.HIGHEST,
    )
    taps = [
        # [input, output, tap]: the input that an output sees through a tap, along one axis.
        np.arange(inside)[:, None, None] - np.arange(out)[:, None] + before
        == np.arange(inside + before + after - out + 1)
        for inside, out, (before, after) in zip(inputs, outputs, pads, strict=True)
    ]
    pairs = pairs.reshape(-1, *inputs, *outputs)
    return jnp.einsum(
        "cyxhw,yhk,xwl->klc",
        pairs,
        *(jnp.asarray(tap, dtype) for tap in taps),
        precision=lax.Precision.HIGHEST,
    )


@partial(jax.jit, static_argnames="pads")  # traced once for each set of shapes
def _kernel_gradient_by_rows(x: Array, gradient: Array, pads: Pads) -> Array:
    """Loops over image rows with `[KW][KH, W * C]` sums that stay in cache, and reduces over W at the end.

    The plain form is 49 reductions of leading axes to `[C]`, which XLA's CPU backend does slowly. W and C are
    one axis here, so that vector registers are full even with few channels; the next column is C further on.
    """
    padded = _padded(x, pads)
    batch, height, width, channels = gradient.shape
    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    dtype = _accumulator(padded)
    padded = padded.reshape(*padded.shape[:2], -1)
    gradient = gradient.reshape(batch, height, -1)
    length = width * channels

    def add_row(index, sums):
        image, row = index // height, index % height
        window = lax.dynamic_slice(padded, (image, row, 0), (1, rows, padded.shape[2]))[0].astype(dtype)
        line = lax.dynamic_slice(gradient, (image, row, 0), (1, 1, length))[0].astype(dtype)
        line = lax.broadcast_in_dim(line, (rows, length), (0, 1))

        def product(start):
            return lax.mul(lax.slice(window, (0, start), (rows, start + length)), line)

        return tuple(lax.add(total, product(column * channels)) for column, total in enumerate(sums))

    zeros = tuple(jnp.zeros((rows, length), dtype) for _ in range(columns))
    sums = lax.fori_loop(0, batch * height, add_row, zeros)
    return jnp.stack([total.reshape(rows, width, channels).sum(axis=1) for total in sums], axis=1)
