"""Full convolution at stride 1: the native operation, but its kernel's gradient as matrix products on CPUs.

XLA's CPU backend computes the gradient in the kernel as a convolution whose window is the whole map, which
takes more than twice as long as one matrix product per tap.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnx2_jax.kernels.depthwise import same_pads


@jax.custom_vjp
def conv(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "b h w o"]:
    """Cross-correlates all channels, stride 1, zero padding to the same size.

    Args:
      x: `[B, H, W, I]` in any floating dtype.
      kernel: `[KH, KW, I, O]` of the same dtype, of odd sizes.

    Returns:
      `[B, H, W, O]` in the dtype of `x`.
    """
    return native_conv(x, kernel)


def _forward(x, kernel):
    return native_conv(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    x_gradient = native_conv(gradient, kernel[::-1, ::-1].swapaxes(2, 3))

    def by_products(x, gradient):
        return _kernel_gradient(x, gradient, (kernel.shape[0], kernel.shape[1])).astype(kernel.dtype)

    def natively(x, gradient):
        return jax.linear_transpose(lambda kernel: native_conv(x, kernel), kernel)(gradient)[0]

    return x_gradient, lax.platform_dependent(x, gradient, cpu=by_products, default=natively)


conv.defvjp(_forward, _backward)


def native_conv(x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"]) -> Float[Array, "b h w o"]:
    """Computes `conv` by XLA's operation, with XLA's gradients: the plain reference."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=same_pads(kernel.shape),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _kernel_gradient(x: Array, gradient: Array, size: tuple[int, int]) -> Array:
    """Returns `[KH, KW, I, O]` in float32 or wider: per tap, the product of the shifted map and gradient."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *same_pads(size), (0, 0)))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    products = [
        jnp.einsum(
            "bhwi,bhwo->io",
            padded[:, row : row + height, column : column + width],
            gradient,
            preferred_element_type=dtype,
        )
        for row in range(size[0])
        for column in range(size[1])
    ]
    return jnp.stack(products).reshape(*size, *products[0].shape)
