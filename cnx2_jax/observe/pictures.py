"""Picture files."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new


def check_picture(path: Path) -> None:
    """Raises UserError if a picture cannot be written there: see `check_new`, or it names no format."""
    check_new(path, "--out")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"'{path}' names no image format; end it in .png")


def write_picture(picture: UInt8[np.ndarray, "height width 3"], path: Path) -> None:
    """Writes a picture, in the format that its name ends in.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write '{path}': {error}") from None
