"""Bilinear resizing and adaptive pooling of maps, as products with constant matrices along each axis.

Both follow PyTorch: `interpolate(mode="bilinear", align_corners=False)` without antialiasing, and
`adaptive_avg_pool2d`.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def bilinear_weights(size: int, to: int) -> Float[np.ndarray, "to size"]:
    """Returns the matrix `[to, size]` that resizes an axis; positions are pixel centres."""
    place = np.maximum((np.arange(to) + 0.5) * size / to - 0.5, 0)
    low = np.minimum(place.astype(int), size - 1)
    share = place - low
    weights = np.zeros((to, size))
    np.add.at(weights, (np.arange(to), low), 1 - share)
    np.add.at(weights, (np.arange(to), np.minimum(low + 1, size - 1)), share)
    return weights


@functools.cache
def pooling_weights(size: int, bins: int) -> Float[np.ndarray, "bins size"]:
    """Returns the matrix `[bins, size]` that averages an axis over bins.

    Bin i covers positions floor(i size / bins) up to ceil((i + 1) size / bins), so neighbours share a
    position where the size is not a multiple, and an axis shorter than the number of bins is repeated.
    """
    weights = np.zeros((bins, size))
    for index in range(bins):
        begin, end = index * size // bins, -((index + 1) * size // -bins)
        weights[index, begin:end] = 1 / (end - begin)
    return weights


def resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b height width c"]:
    """Resizes maps to `size` (height, width), bilinearly; in the dtype of `x`."""
    if x.shape[1:3] == size:
        return x
    return _along_axes(x, bilinear_weights(x.shape[1], size[0]), bilinear_weights(x.shape[2], size[1]))


def adaptive_pool(x: Float[Array, "b h w c"], bins: int) -> Float[Array, "b bins bins c"]:
    """Averages maps over `bins` x `bins` bins; in the dtype of `x`."""
    return _along_axes(x, pooling_weights(x.shape[1], bins), pooling_weights(x.shape[2], bins))


def _along_axes(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Multiplies the rows of a map by one matrix and its columns by another."""
    if rows.shape[0] * x.shape[2] <= x.shape[1] * columns.shape[0]:  # the smaller result first
        return _along_columns(_along_rows(x, rows), columns)
    return _along_rows(_along_columns(x, columns), rows)


def _along_rows(x: Array, weights: np.ndarray) -> Array:
    return jnp.einsum("yh,bhwc->bywc", jnp.asarray(weights, x.dtype), x)


def _along_columns(x: Array, weights: np.ndarray) -> Array:
    return jnp.einsum("xw,bhwc->bhxc", jnp.asarray(weights, x.dtype), x)


def resized_conv(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], size: tuple[int, int]
) -> Float[Array, "b height width o"]:
    """Computes `conv(resize(x, size), kernel)` without the large map of the input's channels.

    Resizing acts on positions and a kernel's tap on channels, so they commute: this applies all taps at the
    small size, and the shift of each tap is part of its resizing matrix. Enlarging twofold, it needs a
    quarter of the multiplications of the plain order, and less with larger factors.
    """
    taps_y, taps_x, _, features = kernel.shape
    rows = _shifted(bilinear_weights(x.shape[1], size[0]), taps_y)
    columns = _shifted(bilinear_weights(x.shape[2], size[1]), taps_x).reshape(size[1], -1)
    parts = []
    for taps in kernel:
        mixed = jnp.einsum("bhwi,xio->bhwxo", x, taps)
        mixed = mixed.reshape(*x.shape[:2], -1, features)
        parts.append(_along_columns(mixed, columns))
    stacked = jnp.stack(parts, axis=2).reshape(x.shape[0], -1, size[1], features)
    return _along_rows(stacked, rows.reshape(size[0], -1))


def _shifted(weights: np.ndarray, taps: int) -> Float[np.ndarray, "to size taps"]:
    """Returns for each tap the matrix followed by the tap's shift, with zeros outside the map."""
    reach = taps // 2
    padded = np.pad(weights, ((reach, reach), (0, 0)))
    return np.stack([padded[tap : tap + len(weights)] for tap in range(taps)], axis=-1)
