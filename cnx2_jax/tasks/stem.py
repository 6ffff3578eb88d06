"""The stem's kernel for images with other bands than those that a checkpoint was trained on."""

import numpy as np

from cnx2_jax.bands import places_of, split_names, used_names
from cnx2_jax.errors import UserError

CHOICES = "mean, tile, map:R,G,B (names of bands) or fresh"
_MAP = "map:"


def check(choice: str) -> None:
    """Raises UserError if `config.init_bands` is none of the choices; called before anything is read."""
    if choice and choice not in ("mean", "tile", "fresh") and not choice.startswith(_MAP):
        raise UserError(f"unknown init_bands '{choice}'; choose {CHOICES}")


def adapted(kernel: np.ndarray, fresh: np.ndarray, choice: str, names: tuple[str, ...]) -> np.ndarray:
    """Returns a stem kernel for `len(names)` bands, float32 [p, p, bands, dim].

    `mean` gives every band the mean kernel, and `tile` repeats the kernels in turn. Both are scaled to leave
    the response to equal bands as it was. `map:R,G,B` gives the three named bands the kernels of red, green
    and blue, and all others 0, so that the response to those three stays, and the others are learned. `fresh`
    takes the newly initialised kernel.

    Args:
      kernel: of the checkpoint, [p, p, its bands, dim].
      fresh: newly initialised, [p, p, bands, dim].
      choice: `config.init_bands`, not empty; see `check`.
      names: of the bands of the run.

    Raises:
      UserError: an unknown band, or a checkpoint without three bands for `map`.
    """
    before, after = kernel.shape[2], len(names)
    if choice == "fresh":
        return fresh
    if choice == "mean":
        return np.repeat(kernel.sum(axis=2, keepdims=True) / after, after, axis=2)
    result = np.zeros(fresh.shape, kernel.dtype)
    if choice == "tile":
        # Each kernel is shared by the bands that it falls on; with fewer bands, a band gets several kernels.
        for place in range(max(before, after)):
            sharing = -(-(after - place % before) // before) if after > before else 1
            result[:, :, place % after] += kernel[:, :, place % before] / sharing
        return result
    places = places_of(split_names(choice.removeprefix(_MAP), "init_bands"), names, "init_bands")
    if len(places) != 3 or before != 3:
        raise UserError(
            f"init_bands '{choice}' must name three bands, for a checkpoint of three, not of {before}; "
            f"choose {CHOICES}"
        )
    result[:, :, list(places)] = kernel
    return result


def adapt(kernel: np.ndarray, fresh: np.ndarray, source: str, choice: str, data: object) -> np.ndarray:
    """Returns the kernel of a checkpoint for the bands of a run; see `adapted`.

    Args:
      kernel, fresh: see `adapted`.
      source: the path of the checkpoint, for messages.
      choice: `config.init_bands`; only read if the numbers of bands differ.
      data: `config.data`, which names the bands.

    Raises:
      UserError: the numbers of bands differ and `choice` is empty; see `adapted`.
    """
    before, after = kernel.shape[2], fresh.shape[2]
    if before == after:
        return kernel
    if not choice:
        raise UserError(
            f"checkpoint '{source}' is of images with {before} bands, and the run's have {after}; set "
            f"init_bands to {CHOICES}"
        )
    return adapted(np.asarray(kernel), fresh, choice, used_names(data, after))
