"""Depthwise convolution: one function, the fastest form for each platform.

XLA's CPU backend runs a 7x7 grouped convolution 15 to 30 times slower than the same sum written as shifted
multiply-adds, which it fuses into one vectorised loop; TPUs and GPUs have native operations for it. The form
is chosen at lowering, so one traced program serves every platform.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]


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
    return convolve(_padded(x, same_pads(kernel.shape)), kernel)


def _forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    # The input's gradient is the same operation with the kernel flipped and the padding's sides swapped.
    pads = same_pads(kernel.shape)
    (top, bottom), (left, right) = pads
    x_gradient = convolve(_padded(gradient, ((bottom, top), (right, left))), kernel[::-1, ::-1])
    return x_gradient, kernel_gradient(_padded(x, pads), gradient).astype(kernel.dtype)


depthwise_conv.defvjp(_forward, _backward)


def same_pads(size: tuple[int, ...]) -> Pads:
    """Returns the padding, ((top, bottom), (left, right)), that keeps the size; `size` starts KH, KW."""
    height, width = size[:2]
    return (((height - 1) // 2, height // 2), ((width - 1) // 2, width // 2))


def _padded(x: Array, pads: Pads) -> Array:
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def convolve(padded: Float[Array, "b hp wp c"], kernel: Float[Array, "kh kw c"]) -> Float[Array, "b h w c"]:
    """Cross-correlates a map that is already padded; not differentiable on every platform."""
    return lax.platform_dependent(padded, kernel, cpu=_shifts_once, default=_native)


def kernel_gradient(
    padded: Float[Array, "b hp wp c"], gradient: Float[Array, "b h w c"]
) -> Float[Array, "kh kw c"]:
    """Returns the gradient of `convolve` with respect to its kernel, in float32 or wider."""
    return lax.platform_dependent(
        padded, gradient, cpu=_kernel_gradient_by_rows, default=_kernel_gradient_native
    )


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _native(padded: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        padded,
        kernel[:, :, None, :],
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=padded.shape[-1],
    )


def _shifts_once(padded: Array, kernel: Array) -> Array:
    """Computes the shifts once, although XLA would repeat them in every operation that uses the result.

    The CPU backend fuses a sum of shifts, being elementwise, into each of its consumers (LayerNorm and its
    gradient alone are seven), and drops optimization barriers before that. It does not fuse across a
    conditional with an outcome unknown at compile time. If the kernel's first value is NaN, so is the result.
    """
    shape = jax.eval_shape(_shifts, padded, kernel)
    known = kernel[0, 0, 0] == kernel[0, 0, 0]
    return lax.cond(known, _shifts, lambda *_: jnp.full(shape.shape, jnp.nan, shape.dtype), padded, kernel)


def _shifts(padded: Array, kernel: Array) -> Array:
    batch, height, width, channels = padded.shape
    height, width = height - kernel.shape[0] + 1, width - kernel.shape[1] + 1
    dtype = _accumulator(padded)
    kernel = kernel.astype(dtype)
    total = jnp.zeros((batch, height, width, channels), dtype)
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            window = padded[:, row : row + height, column : column + width]
            total += window.astype(dtype) * kernel[row, column]
    return total.astype(padded.dtype)


def _kernel_gradient_native(padded: Array, gradient: Array) -> Array:
    size = [p - g + 1 for p, g in zip(padded.shape[1:3], gradient.shape[1:3], strict=True)]
    kernel = jnp.zeros((*size, padded.shape[-1]), padded.dtype)
    (found,) = jax.linear_transpose(lambda k: _native(padded, k), kernel)(gradient)
    return found.astype(_accumulator(padded))  # the dtype of the CPU's form


def _kernel_gradient_by_rows(padded: Array, gradient: Array) -> Array:
    """Loops over image rows with `[KW][KH, W * C]` sums that stay in cache, and reduces over W at the end.

    The plain form is 49 reductions of leading axes to `[C]`, which XLA's CPU backend does slowly. W and C are
    one axis here, so that vector registers are full even with few channels; the next column is C further on.
    """
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
        return tuple(
            total + window[:, column * channels : column * channels + length] * line
            for column, total in enumerate(sums)
        )

    zeros = tuple(jnp.zeros((rows, length), dtype) for _ in range(columns))
    sums = lax.fori_loop(0, batch * height, add_row, zeros)
    return jnp.stack([total.reshape(rows, width, channels).sum(axis=1) for total in sums], axis=1)
