"""Writes picture files."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new


def check_picture(path: Path) -> None:
    """Raises UserError unless `path` is new, writable and ends in the suffix of an image format."""
    check_new(path, "--out")
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"'{path}' does not end in the suffix of an image format; end it in .png")


def encode(picture: UInt8[np.ndarray, "height width 3"], path: Path) -> bytes:
    """Returns a picture as a file in the format of the path's suffix."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, Image.registered_extensions()[path.suffix.lower()])
    return file.getvalue()


def write_picture(picture: UInt8[np.ndarray, "height width 3"], path: Path) -> None:
    """Writes a picture in the format of the path's suffix.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture, path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write '{path}': {error}") from None
