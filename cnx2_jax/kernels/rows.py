"""Gathers positions of a map (rows of channels) by index, and convolves them where they are gathered."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cnx2_jax.kernels.depthwise import Pads, convolve, kernel_gradient, same_pads


def pick(x: Float[Array, "b n c"], index: Int[Array, "b m"]) -> Float[Array, "b m c"]:
    """Picks rows by index: `out[b, m] = x[b, index[b, m]]`, zero where the index is n or more.

    On TPUs this is a product with a one-hot matrix, which is exact and runs on the matrix unit; elsewhere a
    gather. Its derivative is a scatter; `move` has a faster one for rows that are picked at most once.
    """
    return lax.platform_dependent(x, index, tpu=_pick_by_product, default=_pick_by_gather)


def _pick_by_gather(x: Array, index: Array) -> Array:
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))(x, index)


def _pick_by_product(x: Array, index: Array) -> Array:
    matrix = jax.nn.one_hot(index, x.shape[1], dtype=x.dtype)
    # HIGHEST: the default precision would round float32 values to bfloat16.
    return jnp.einsum("bmn,bnc->bmc", matrix, x, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def move(
    x: Float[Array, "b n c"], index: Int[Array, "b m"], inverse: Int[Array, "b n"]
) -> Float[Array, "b m c"]:
    """Returns `pick(x, index)` for an index without repeated rows, whose gradient is a `pick` as well.

    Args:
      x: `[B, N, C]`.
      index: `[B, M]`, the row of `x` that each output takes; N or more for zeros.
      inverse: `[B, N]`, the output that takes each row of `x`; M or more for none.
    """
    return pick(x, index)


def _move_forward(x, index, inverse):
    return pick(x, index), inverse


def _move_backward(inverse, gradient):
    return pick(gradient, inverse), None, None


move.defvjp(_move_forward, _move_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows, each with a border, in which the rows of a map `[B, N, C]` are placed to be convolved.

    Attributes:
      around: `[B, M]`, the row at each position of all windows, borders included; N or more for none.
      inside: None if the rows are the insides of the windows in order; otherwise there is one window with an
        empty border, and this is `[B, P]`, the row at each of its positions without the border.
      out: `[B, N]`, the inverse of `inside`.
      shape: rows and columns of a window without its border.
      kernel: rows and columns of the kernel that the border has room for.
    """

    around: Int[Array, "b m"]
    inside: Int[Array, "b p"] | None
    out: Int[Array, "b n"] | None
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    kernel: tuple[int, int] = dataclasses.field(metadata={"static": True})


@jax.custom_vjp
def depthwise_conv_windows(
    x: Float[Array, "b n c"], kernel: Float[Array, "kh kw c"], windows: Windows
) -> Float[Array, "b n c"]:
    """Convolves each channel with its own kernel, within windows.

    The relation "row i is a neighbour of row j" must be symmetric: the gradient is computed as the same
    operation with the kernel flipped.

    Args:
      x: `[B, N, C]`.
      kernel: `[KH, KW, C]`, of odd sizes.
      windows: where each row is placed.

    Returns:
      `[B, N, C]`.
    """
    y = _in_windows(convolve, windows, x, kernel)
    y = y.reshape(len(x), -1, x.shape[-1])
    return y if windows.out is None else pick(y, windows.out)


def _forward(x, kernel, windows):
    return depthwise_conv_windows(x, kernel, windows), (x, kernel, windows)


def _backward(residuals, gradient):
    x, kernel, windows = residuals
    x_gradient = depthwise_conv_windows(gradient, kernel[::-1, ::-1], windows)
    inside = gradient if windows.inside is None else pick(gradient, windows.inside)
    inside = inside.reshape(-1, *windows.shape, x.shape[-1])
    found = _in_windows(kernel_gradient, windows, x, inside)
    return x_gradient, found.astype(kernel.dtype), None


depthwise_conv_windows.defvjp(_forward, _backward)


def _in_windows(
    function: Callable[[Array, Array, Pads], Array], windows: Windows, x: Array, other: Array
) -> Array:
    """Calls `function(windows' maps, other, pads)`; the pads are what the maps lack of their borders.

    CPUs pick an empty border together with the rest, because padding is slower there. Other platforms move
    only the rows, and fuse the padding into their convolution.
    """
    border = [side + size - 1 for side, size in zip(windows.shape, windows.kernel, strict=True)]

    def on_all(x, other):
        return function(pick(x, windows.around).reshape(-1, *border, x.shape[-1]), other, ((0, 0), (0, 0)))

    if windows.inside is None:
        return on_all(x, other)
    index = windows.inside

    def on_inside(x, other):
        inside = pick(x, index).reshape(-1, *windows.shape, x.shape[-1])
        return function(inside, other, same_pads(windows.kernel))

    return lax.platform_dependent(x, other, cpu=on_all, default=on_inside)
