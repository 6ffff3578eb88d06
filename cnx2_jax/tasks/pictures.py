"""Pictures of images with any bands: three bands by name, or a false-colour projection, stretched."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from cnx2_jax.bands import places_of, split_names, used_names
from cnx2_jax.errors import UserError

PERCENTILES = (2, 98)


def are_colours(config: ConfigDict) -> bool:
    """Returns whether images are drawn as they are: RGB or grey of 8 bits, unless bands are named."""
    return config.data.dtype == "uint8" and config.model.in_chans in (1, 3) and not config.data.show_bands


def projection(config: ConfigDict) -> np.ndarray:
    """Returns the weights of bands in red, green and blue, float32 [bands, 3].

    Red, green and blue are the bands of `data.show_bands`. If it is empty, blue is the mean of the first
    third of the normalised bands, green of the second and red of the last, since bands usually go from short
    to long waves; one band is grey, and of two the second is red, the first blue and green their mean.

    Raises:
      UserError: `data.show_bands` has an unknown band, or does not name three.
    """
    names = used_names(config.data, config.model.in_chans)
    shown = split_names(config.data.show_bands, "data.show_bands")
    if shown and len(shown) != 3:
        raise UserError(f"data.show_bands '{config.data.show_bands}' must name three bands: red, green, blue")
    count = len(names)
    groups: list = [[place] for place in places_of(shown, names, "data.show_bands")]
    if not shown and count <= 2:
        groups = [[count - 1], list(range(count)), [0]]
    elif not shown:
        groups = np.array_split(np.arange(count), 3)[::-1]
    weights = np.zeros((count, 3), np.float32)
    for colour, places in enumerate(groups):
        weights[places, colour] = 1 / len(places)
    return weights


def coloured(config: ConfigDict, images: Mapping[str, np.ndarray], reference: str) -> dict[str, np.ndarray]:
    """Returns normalised images as uint8 RGB, stretched alike.

    Args:
      config: of the run.
      images: float [N, H, W, bands] by name.
      reference: the name of those whose percentiles 2 and 98 become black and full colour.
    """
    weights = projection(config)
    projected = {name: np.asarray(each, np.float32) @ weights for name, each in images.items()}
    low, high = np.percentile(projected[reference], PERCENTILES, axis=(0, 1, 2))
    spread = np.maximum(high - low, 1e-6)
    return {
        name: np.clip(np.round(255 * (each - low) / spread), 0, 255).astype(np.uint8)
        for name, each in projected.items()
    }
