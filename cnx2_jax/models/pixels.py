"""Between the pixels that images are stored in and the numbers that networks compute with."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8


def normalise(
    images: Shaped[Array | np.ndarray, "b height width c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b height width c"]:
    """Maps images to float32: (x - mean) / std per channel, of uint8 images (x / 255 - mean) / std."""
    images = jnp.asarray(images)
    values = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        values = values / 255
    return (values - jnp.array(mean)) / jnp.array(std)


def denormalise(
    images: Float[Array | np.ndarray, "b height width c"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Array, "b height width c"]:
    """Inverse of `normalise` for uint8 images, rounded and clipped."""
    images = (images * jnp.array(std) + jnp.array(mean)) * 255
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def inside(canvas: tuple[int, ...], sizes: Int[Array | np.ndarray, "b 2"]) -> Bool[Array, "b height width"]:
    """Returns which pixels of a canvas are not padding, for images of these heights and widths."""
    rows = jnp.arange(canvas[0]) < sizes[:, :1]
    columns = jnp.arange(canvas[1]) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
