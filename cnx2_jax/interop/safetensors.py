"""Writes folders that other libraries load: `model.safetensors`, and JSON that describes the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, creating
from cnx2_jax.interop.dialects import BACKBONE_PREFIX
from cnx2_jax.interop.facts import (
    HUGGINGFACE_CLASSIFIER,
    HUGGINGFACE_SEGMENTER,
    Facts,
    detector_config,
    detector_preprocessor,
    huggingface_config,
    huggingface_preprocessor,
    huggingface_segmenter_preprocessor,
    huggingface_upernet_config,
    timm_config,
)
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import from_torch, sizes_of, to_torch, variant_of

NAMINGS = ("huggingface", "timm", "mmdetection")
WEIGHTS = "model.safetensors"
SEGMENTER_HEAD = "decode_head.conv_seg.bias"
DETECTOR_HEAD = "roi_head.bbox_head.fc_cls.bias"


class NoRuntimeError(UserError):
    """The library that would run the written model is not installed."""


def write(
    folder: Path,
    params: Mapping[str, np.ndarray],
    facts: Facts,
    naming: str,
    pool_scales: tuple[int, ...] = (),
) -> None:
    """Writes a ConvNeXtV2, an UperNet or a Mask R-CNN as a new folder; after an error there is no folder.

    `huggingface` is for `AutoModelForImageClassification.from_pretrained(folder)`, or `AutoModel` without a
    head; there is no `preprocessor_config.json` for oblong images and for other than uint8, because it cannot
    describe them: `config.json` has mean and deviation of the bands of such arrays.
    An UperNet is for `UperNetForSemanticSegmentation.from_pretrained(folder)`.
    `timm` is for `timm.create_model("local-dir:FOLDER", pretrained=True)`. `mmdetection` is the state dict of
    its Mask R-CNN with mmpretrain's ConvNeXt. Before the folder appears, the weights are read back from it
    and compared bit for bit.

    Args:
      folder: a path that does not exist.
      params: float32 parameters by our names, and the running averages of an UperNet.
      facts: with one class name per class of the head.
      naming: one of NAMINGS; timm has no UperNet, and a Mask R-CNN needs `mmdetection`.
      pool_scales: of an UperNet; empty for a classifier.

    Raises:
      UserError: `folder` exists already or cannot be written, the class names or pool scales do not fit the
        heads, or the library has no such model (see `to_torch` and `facts.timm_config`).
    """
    check_new(folder, "--out")
    head = next((name for name in ("head.bias", SEGMENTER_HEAD, DETECTOR_HEAD) if name in params), None)
    classes = len(params[head]) - (head == DETECTOR_HEAD) if head else 0  # without the background
    if len(facts.class_names) != classes:
        raise UserError(f"{len(facts.class_names)} class names do not fit a head of {classes} classes")
    tensors = to_torch(params, naming)
    documents = _documents(params, facts, naming, pool_scales)
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
      Logits in float32, `[B, classes]`, or `[B, H, W, classes]` of an UperNet; without a head, the normalised
      mean `[B, dims[3]]`.

    Raises:
      NoRuntimeError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        from transformers import (
            AutoModel,
            AutoModelForImageClassification,
            UperNetForSemanticSegmentation,
        )
        from transformers.utils import logging
    except ImportError:
        raise NoRuntimeError(
            f"transformers is needed to run '{folder}'; pip install 'cnx2_jax[transformers]'"
        ) from None
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    kinds: dict[str, Any] = {
        HUGGINGFACE_CLASSIFIER: AutoModelForImageClassification,
        HUGGINGFACE_SEGMENTER: UperNetForSemanticSegmentation,
    }
    kind = kinds.get(architecture, AutoModel)
    logging.disable_progress_bar()
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    pixels = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        found = model(pixels)
    if architecture == HUGGINGFACE_SEGMENTER:
        return found.logits.permute(0, 2, 3, 1).numpy()
    return (found.logits if architecture in kinds else found.pooler_output).numpy()


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


def _documents(
    params: Mapping[str, np.ndarray], facts: Facts, naming: str, pool_scales: tuple[int, ...]
) -> dict[str, dict]:
    """Returns the JSON files by name."""
    if DETECTOR_HEAD in params:
        return {
            "config.json": detector_config(facts),
            "preprocessor_config.json": detector_preprocessor(facts),
        }
    depths, dims = sizes_of(params)
    segments = SEGMENTER_HEAD in params
    prefix = BACKBONE_PREFIX if segments else ""
    patch_size, _, in_chans, _ = params[f"{prefix}downsample_layers.0.0.kernel"].shape
    if segments:
        levels = sum(
            name.startswith("decode_head.psp_modules.") and name.endswith(".kernel") for name in params
        )
        if len(pool_scales) != levels:
            raise UserError(f"{len(pool_scales)} pool scales do not fit {levels} levels of pyramid pooling")
        config = huggingface_upernet_config(
            facts,
            depths,
            dims,
            in_chans,
            patch_size,
            channels=len(params["decode_head.bottleneck.bn.bias"]),
            auxiliary_channels=len(params["auxiliary_head.convs.0.bn.bias"]),
            pool_scales=pool_scales,
        )
        return {
            "config.json": config,
            "preprocessor_config.json": huggingface_segmenter_preprocessor(facts),
        }
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
