"""Reads tensors from files: safetensors, and PyTorch's pickles without running their code."""

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from cnx2_jax.errors import UserError

_PICKLES = (".pt", ".pth", ".bin")

# The keys under which training checkpoints hold the weights, averaged ones first, in the order of timm's
# `load_state_dict` (models/_helpers.py).
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# The first bytes of files that were not downloaded correctly.
_FAILED_DOWNLOADS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"<": "a page of HTML or XML, not weights; download it again",
}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict: `.safetensors`, or `.pt`, `.pth`, `.bin`, which needs the extra `torch`.

    Pickles are read weights-only, so nothing in them is executed. Besides tensors and plain values they may
    hold what training code saves with its arguments: argparse.Namespace, paths and NumPy numbers. From a
    training checkpoint this returns the weights, averaged ones (EMA) if there are any.

    Returns:
      Arrays by name; floating-point ones as float32, to which half precision widens exactly.

    Raises:
      UserError: it is not such a file, is damaged, holds other objects, or PyTorch is not installed.
    """
    known = [".safetensors", *_PICKLES]
    if path.suffix not in known:
        raise UserError(f"'{path}' is not a file of weights that cnx2 reads; give one of {', '.join(known)}")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; give a file of weights") from None
    if not start:
        raise UserError(f"'{path}' is empty; download it again")
    for begin, description in _FAILED_DOWNLOADS.items():
        if start.startswith(begin):
            raise UserError(f"'{path}' is {description}")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return {name: _as_float32(tensor) for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"'{path}' is damaged: {error}; download it again") from None
    except (AttributeError, TypeError, KeyError) as error:  # a dtype that NumPy does not have, such as float8
        raise UserError(
            f"'{path}' holds a dtype that NumPy does not have ({error}); convert it to float32 first"
        ) from None


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(f"'{path}' needs PyTorch to be read; pip install 'cnx2_jax[torch]'") from None
    try:
        with torch.serialization.safe_globals(_inert_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly every kind of exception on a damaged file
        if culprit := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"'{path}' was not loaded: it asks for {culprit[1]}, which is not a tensor and could run any "
                "code; save its state dict alone, or as .safetensors"
            ) from None
        # PyTorch's own message advises loading such a file without the weights-only check.
        raise UserError(f"'{path}' is damaged, or not a PyTorch file of tensors; download it again") from None
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"'{path}' holds no state dict (nor under one of the keys {', '.join(_WRAPPERS)})")
    for name, value in content.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        if not plain:
            raise UserError(f"'{path}' is not a state dict: its entry '{name}' is not a plain tensor")
    return {
        str(name): (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in content.items()
    }


def _inert_globals() -> list[Any]:
    """Returns the classes that a pickle may name beside tensors; building them executes nothing of the file.

    The authors' submitit launchers put paths into the arguments that they save. These become pure paths,
    which touch no file system and exist on every platform; Python 3.13 pickles them under another module.
    """
    paths: list[Any] = [
        (pure, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for pure, names in (
            (PurePosixPath, ("PosixPath", "PurePosixPath")),
            (PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
        )
        for name in names
    ]
    scalar = np.float64(0).__reduce__()[0]  # NumPy's own function that numbers are pickled with
    numbers: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    # Fixed-size kinds only: a dtype of objects could hold anything.
    kinds = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [argparse.Namespace, *paths, *numbers, np.dtype, *kinds]


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    floating = np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16
    return tensor.astype(np.float32, copy=False) if floating else tensor
