"""Tensors from files: PyTorch's pickles, read without running what is in them, and safetensors."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from cnx2_jax.errors import UserError

_PICKLES = (".pt", ".pth", ".bin")

# Under which of its keys a training checkpoint holds the weights: averaged ones first, as timm's
# `load_state_dict` (models/_helpers.py) takes them.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# How files begin that were not downloaded as meant.
_STRANGERS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"<": "a page of HTML or XML, not weights; download it again",
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict: `.safetensors`, or `.pt`, `.pth`, `.bin`, which needs the extra `torch`.

    Pickles are read weights-only: nothing in them is run, and beside tensors and plain values only
    argparse.Namespace is let in, as the authors' training code saves its arguments. Of a training checkpoint
    this returns the weights, averaged ones (EMA) if it has them.

    Returns:
      Arrays by name; floating ones as float32, to which half precision widens exactly.

    Raises:
      UserError: it is no such file, is damaged, holds other objects, or PyTorch is missing.
    """
    known = [".safetensors", *_PICKLES]
    if path.suffix not in known:
        raise UserError(f"'{path}' is no file of weights that cnx2 knows; it reads {', '.join(known)}")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; give a file of weights") from None
    if not start:
        raise UserError(f"'{path}' is empty; download it again")
    for begin, what in _STRANGERS.items():
        if start.startswith(begin):
            raise UserError(f"'{path}' is {what}")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"'{path}' is damaged: {error}; download it again") from None


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(f"'{path}' needs PyTorch to be read; pip install 'cnx2_jax[torch]'") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file there is hardly one that torch.load does not raise
        if culprit := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"'{path}' was not loaded: it asks for {culprit[1]}, which is no tensor and could run any "
                "program; save its state dict alone, or as .safetensors"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"'{path}' is damaged or no PyTorch file: {reason}; download it again") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"'{path}' holds no state dict (also not as one of {', '.join(_WRAPPERS)})")
    for name, value in content.items():
        if not (isinstance(value, torch.Tensor) and value.layout == torch.strided):
            raise UserError(f"'{path}' is no state dict: '{name}' in it is no plain tensor")
    return {
        str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in content.items()
    }


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    floating = np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16
    return tensor.astype(np.float32, copy=False) if floating else tensor
