"""Folders that transformers and timm load: `model.safetensors`, and JSON that says what it is."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, creating
from cnx2_jax.interop import facts as said
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import from_torch, sizes_of, to_torch, variant_of

NAMINGS = ("huggingface", "timm")
WEIGHTS = "model.safetensors"


class NoRuntimeError(UserError):
    """The library that would run what was written is not installed."""


def write(folder: Path, params: Mapping[str, np.ndarray], facts: Facts, naming: str) -> None:
    """Writes a ConvNeXtV2 as a new folder, whole or not at all.

    `huggingface`: for `AutoModelForImageClassification.from_pretrained(folder)`, without a head for
    `AutoModel`; images of an oblong size have no `preprocessor_config.json`, which could not say it.
    `timm`: for `timm.create_model("local-dir:FOLDER", pretrained=True)`. Before the folder appears, the
    weights are read back from it and compared bit for bit.

    Args:
      folder: where nothing is yet.
      params: float32, by our names.
      facts: as many `class_names` as the head has classes.
      naming: one of NAMINGS.

    Raises:
      UserError: something is there already, it cannot be written, class names do not fit the head, or the
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
        # PyTorch's mark: older transformers refuse a file without.
        safetensors.numpy.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for name, document in documents.items():
            (partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _check_same(params, partial / WEIGHTS)


def run_huggingface(folder: Path, images: np.ndarray) -> np.ndarray:
    """Loads a folder that `write` made for Hugging Face with transformers, and runs it.

    Args:
      images: normalised, float32 `[B, H, W, C]`.

    Returns:
      Logits `[B, classes]` in float32; of a model without a head the normalised mean `[B, dims[3]]`.

    Raises:
      NoRuntimeError: PyTorch or transformers is missing.
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
    has_head = architecture == said.HUGGINGFACE_CLASSIFIER
    kind = AutoModelForImageClassification if has_head else AutoModel
    logging.disable_progress_bar()
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        found = model(pixels)
    return (found.logits if has_head else found.pooler_output).numpy()


def run_timm(folder: Path, images: np.ndarray) -> np.ndarray:
    """The same of a folder made for timm, with timm."""
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
        return {"config.json": said.timm_config(facts, variant, depths, dims, in_chans, patch_size)}
    documents = {"config.json": said.huggingface_config(facts, depths, dims, in_chans, patch_size)}
    if processor := said.huggingface_preprocessor(facts):
        documents["preprocessor_config.json"] = processor
    return documents


def _check_same(params: Mapping[str, np.ndarray], path: Path) -> None:
    """Raises OSError unless the file holds these very bits."""
    read = from_torch(read_tensors(path), str(path)).params
    for name, value in params.items():
        if name not in read or read[name].tobytes() != np.asarray(value).tobytes():
            raise OSError(f"'{name}' came back otherwise than it was written")
