"""Between the pixels that images are stored in and the numbers that networks compute with."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


def normalise(
    images: UInt8[Array | np.ndarray, "b height width c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b height width c"]:
    """Maps uint8 images to float32: (x / 255 - mean) / std per channel."""
    return (jnp.asarray(images).astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def denormalise(
    images: Float[Array | np.ndarray, "b height width c"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Array, "b height width c"]:
    """Inverse of `normalise`, rounded and clipped to uint8."""
    images = (images * jnp.array(std) + jnp.array(mean)) * 255
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def inside(canvas: tuple[int, ...], sizes: Int[Array | np.ndarray, "b 2"]) -> Bool[Array, "b height width"]:
    """Returns which pixels of a canvas are not padding, for images of these heights and widths."""
    rows = jnp.arange(canvas[0]) < sizes[:, :1]
    columns = jnp.arange(canvas[1]) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
