"""Depthwise convolution: one function, the fastest form for each platform.

XLA's CPU backend runs a 7x7 grouped convolution 15 to 30 times slower than the same sum written as shifted
multiply-adds, which it fuses into one vectorised loop; TPUs and GPUs have native operations for it. The
choice is made while lowering, so one traced program serves every platform.
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
      kernel: `[KH, KW, C]` of the same dtype; sizes may be even (then one more row is padded below than
        above, as XLA's "SAME" does).

    Returns:
      `[B, H, W, C]` in the dtype of `x`. Products are accumulated in float32 at least, and so are both
      gradients.
    """
    return convolve(_padded(x, same_pads(kernel.shape)), kernel)


def _forward(x, kernel):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    # The input gradient is the same operation: kernel flipped, the two sides of the padding swapped.
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
    """Cross-correlates a map that has its border already; not differentiable on every platform."""
    return lax.platform_dependent(padded, kernel, cpu=_shifts_once, default=_native)


def kernel_gradient(
    padded: Float[Array, "b hp wp c"], gradient: Float[Array, "b h w c"]
) -> Float[Array, "kh kw c"]:
    """Returns the gradient of `convolve` in its kernel, in float32 at least."""
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
    """Keeps XLA from doing the shifts anew in whatever uses them.

    The CPU backend fuses a sum of shifts, being elementwise, into every consumer (LayerNorm and its gradient
    alone are seven) and drops optimization barriers before it does so. It does not fuse into a conditional
    whose outcome it cannot know; if the kernel's first value is NaN, so is the result.
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
    return found.astype(_accumulator(padded))  # as the other form has it


def _kernel_gradient_by_rows(padded: Array, gradient: Array) -> Array:
    """Loops over image rows with `[KW][KH, W * C]` sums that stay in cache; reduces over W once.

    XLA's CPU backend reduces leading axes badly, which is what 49 plain reductions to `[C]` would be. W and
    C are one axis, along which a step of one column is a step of C: few channels still fill vectors.
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
