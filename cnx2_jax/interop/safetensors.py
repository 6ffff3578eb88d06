"""Writes folders that transformers and timm load: `model.safetensors`, and JSON that describes the model."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, creating
from cnx2_jax.interop.facts import (
    HUGGINGFACE_CLASSIFIER,
    Facts,
    huggingface_config,
    huggingface_preprocessor,
    timm_config,
)
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import from_torch, sizes_of, to_torch, variant_of

NAMINGS = ("huggingface", "timm")
WEIGHTS = "model.safetensors"


class NoRuntimeError(UserError):
    """The library that would run the written model is not installed."""


def write(folder: Path, params: Mapping[str, np.ndarray], facts: Facts, naming: str) -> None:
    """Writes a ConvNeXtV2 as a new folder; after an error there is no folder.

    `huggingface` is for `AutoModelForImageClassification.from_pretrained(folder)`, or `AutoModel` without a
    head; there is no `preprocessor_config.json` for oblong images, because it cannot describe them.
    `timm` is for `timm.create_model("local-dir:FOLDER", pretrained=True)`. Before the folder appears, the
    weights are read back from it and compared bit for bit.

    Args:
      folder: a path that does not exist.
      params: float32 parameters by our names.
      facts: with one class name per class of the head.
      naming: one of NAMINGS.

    Raises:
      UserError: `folder` exists already or cannot be written, the class names do not fit the head, or the
        library has no such model (see `to_torch` and `facts.timm_config`).
    """
    check_new(folder, "--out")
    classes = len(params["head.bias"]) if "head.bias" in params else 0
    if len(facts.class_names) != classes:
        raise UserError(f"{len(facts.class_names)} class names do not fit a head of {classes} classes")
    tensors = to_torch(params, naming)
    documents = _documents(params, facts, naming)
    with creating(folder) as partial:
        partial.mkdir()
        # Older transformers refuse a file without this mark of PyTorch.
        safetensors.numpy.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for name, document in documents.items():
            (partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _check_same(params, partial / WEIGHTS)


def run_huggingface(folder: Path, images: np.ndarray) -> np.ndarray:
    """Loads a folder written by `write` for Hugging Face with transformers, and runs it.

    Args:
      images: normalised, float32 `[B, H, W, C]`.

    Returns:
      Logits `[B, classes]` in float32; without a head, the normalised mean `[B, dims[3]]`.

    Raises:
      NoRuntimeError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModel, AutoModelForImageClassification
        from transformers.utils import logging
    except ImportError:
        raise NoRuntimeError(
            f"transformers is needed to run '{folder}'; pip install 'cnx2_jax[transformers]'"
        ) from None
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    has_head = architecture == HUGGINGFACE_CLASSIFIER
    kind = AutoModelForImageClassification if has_head else AutoModel
    logging.disable_progress_bar()
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        found = model(pixels)
    return (found.logits if has_head else found.pooler_output).numpy()


def run_timm(folder: Path, images: np.ndarray) -> np.ndarray:
    """Loads a folder written by `write` for timm with timm, and runs it; see `run_huggingface`."""
    try:
        import timm
        import torch
    except ImportError:
        raise NoRuntimeError(f"timm is needed to run '{folder}'; pip install 'cnx2_jax[timm]'") from None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        return model(pixels).numpy()


def _documents(params: Mapping[str, np.ndarray], facts: Facts, naming: str) -> dict[str, dict]:
    """Returns the JSON files by name."""
    depths, dims = sizes_of(params)
    patch_size, _, in_chans, _ = params["downsample_layers.0.0.kernel"].shape
    if naming == "timm":
        variant = variant_of(depths, dims)
        return {"config.json": timm_config(facts, variant, depths, dims, in_chans, patch_size)}
    documents = {"config.json": huggingface_config(facts, depths, dims, in_chans, patch_size)}
    if processor := huggingface_preprocessor(facts):
        documents["preprocessor_config.json"] = processor
    return documents


def _check_same(params: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises OSError unless the file holds exactly these bits."""
    read = from_torch(read_tensors(path), str(path)).params
    for name, value in params.items():
        if name not in read or read[name].tobytes() != np.asarray(value).tobytes():
            raise OSError(f"'{name}' was read back with other bits than were written")
