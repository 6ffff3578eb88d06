"""Sliding windows over images of any size: static shapes, and as many windows as the images need."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Size = tuple[int, int]


def average_over_windows(
    logits_of: Callable[[Array], Array],
    images: Float[Array, "b height width c"],
    sizes: Int[Array, "b 2"],
    window: Size,
    stride: Size,
) -> Float[Array, "b height width k"]:
    """Returns the logits of every pixel, averaged over the windows that see it.

    Windows lie on a grid of `stride`; the last one of each row and column is moved back to the edge of the
    image (mmsegmentation's `slide_inference`). Where an image is smaller than the window, the window ends in
    padding. All images of a batch take as many rounds as the one with the most windows.

    Args:
      logits_of: maps windows `[b, *window, c]` to logits `[b, *window, k]`.
      images: normalised, 0 beyond their sizes, and at least as large as the window.
      sizes: height and width of each image without its padding.
      window: height and width of a window.
      stride: rows and columns from one window to the next.

    Returns:
      Logits in float32; those beyond an image's size are meaningless.
    """
    counts = [_count(sizes[:, axis], window[axis], stride[axis]) for axis in range(2)]
    total = counts[0] * counts[1]

    def add(index: Array, sums: Array) -> Array:
        place = jnp.minimum(index, total - 1)
        places = place // counts[1], place % counts[1]
        top, left = (_start(places[a], sizes[:, a], window[a], stride[a]) for a in range(2))
        logits = logits_of(_cut(images, top, left, window)).astype(sums.dtype)
        logits = jnp.where((index < total)[:, None, None, None], logits, 0)
        return _put(sums, _cut(sums, top, left, window) + logits, top, left)

    one = jax.ShapeDtypeStruct((len(images), *window, images.shape[-1]), images.dtype)
    classes = jax.eval_shape(logits_of, one).shape[-1]
    sums = jnp.zeros((*images.shape[:-1], classes), jnp.float32)
    sums = jax.lax.fori_loop(0, total.max(), add, sums)
    rows, columns = (
        _seen(images.shape[1 + a], counts[a], sizes[:, a], window[a], stride[a]) for a in range(2)
    )
    # Windows form a grid, so the number of them that see a pixel is a product.
    return sums / (rows[:, :, None, None] * columns[:, None, :, None])


def _count(length, window: int, stride: int):
    """Returns how many windows lie along an axis of this length."""
    return 1 + jnp.maximum(-(-(length - window) // stride), 0)


def _start(place: Array, length: Array, window: int, stride: int) -> Array:
    """Returns where window number `place` of an axis starts."""
    return jnp.maximum(jnp.minimum(place * stride, length - window), 0)


def _seen(canvas: int, count: Array, length: Array, window: int, stride: int) -> Float[Array, "b canvas"]:
    """Returns how many windows see each position of an axis, and 1 where none does."""
    place = jnp.arange(1 + max(0, -(-(canvas - window) // stride)))
    start = _start(place, length[:, None], window, stride)[:, :, None]
    inside = (start <= jnp.arange(canvas)) & (jnp.arange(canvas) < start + window)
    inside &= (place < count[:, None])[:, :, None]
    return jnp.maximum(inside.sum(axis=1), 1).astype(jnp.float32)


def _cut(maps: Array, top: Array, left: Array, window: Size) -> Array:
    """Returns the window `[b, *window, c]` of each map that starts at `top` and `left`, `[b]` each."""

    def one(x: Array, y0: Array, x0: Array) -> Array:
        return jax.lax.dynamic_slice(x, (y0, x0, 0), (*window, x.shape[-1]))

    return jax.vmap(one)(maps, top, left)


def _put(maps: Array, parts: Array, top: Array, left: Array) -> Array:
    """Returns the maps with one part each replaced."""
    return jax.vmap(lambda x, part, y0, x0: jax.lax.dynamic_update_slice(x, part, (y0, x0, 0)))(
        maps, parts, top, left
    )


def resized_to(
    maps: Float[Array, "b height width k"], sizes: Int[Array, "b 2"], targets: Int[Array, "b 2"], canvas: Size
) -> Float[Array, "b rows columns k"]:
    """Resizes the top left `sizes` of each map to `targets`, bilinearly with half-pixel centres.

    Equals `torch.nn.functional.interpolate(align_corners=False)` on each map without its padding. Sizes may
    differ from map to map, as shapes are those of the canvases alone.

    Args:
      maps: padded at bottom and right.
      sizes, targets: height and width of each map before and after.
      canvas: height and width of the result, at least as large as every target.

    Returns:
      The resized maps; values beyond a target are meaningless.
    """

    def along(maps: Array, axis: int) -> Array:
        size, target = sizes[:, axis - 1, None], targets[:, axis - 1, None]
        place = (jnp.arange(canvas[axis - 1]) + 0.5) * (size / target) - 0.5
        place = jnp.clip(place, 0, size - 1)
        low = jnp.floor(place).astype(jnp.int32)
        high = jnp.minimum(low + 1, size - 1)
        share = jnp.expand_dims(place - low, [a for a in range(1, maps.ndim) if a != axis])
        take = jax.vmap(lambda x, indices: jnp.take(x, indices, axis=axis - 1))
        return take(maps, low) * (1 - share) + take(maps, high) * share

    return along(along(maps, 1), 2)
