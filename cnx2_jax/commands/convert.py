"""`cnx2 convert`."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import check_ranges, defaults, image_hw
from cnx2_jax.data.imagenet import CLASS_IDS, describe
from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, local_path, to_path
from cnx2_jax.interop import facts, hub
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import Imported, from_torch
from cnx2_jax.tasks.base import check_keys

TAKES_OVERRIDES = False

DETECTOR_SIZE = (1024, 1024)  # of training images, as in the recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE|hf:OWNER/NAME",
        help="a .safetensors, .pt, .pth or .bin file in official, timm, Hugging Face or mmdetection naming, "
        "or a repository on the Hugging Face hub, optionally with @REVISION; config.json and "
        "preprocessor_config.json beside the weights are read too",
    )
    parser.add_argument(
        "--to", required=True, type=to_path, metavar="FOLDER", help="the new checkpoint folder"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images in pixels; by default the one in config.json, or 224, of a detector 1024",
    )
    parser.add_argument(
        "--class-names",
        type=to_path,
        metavar="FILE",
        help="file with one class name per line; by default the names in config.json, ImageNet's for 1000 "
        "classes, or class_0000, class_0001, ...",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    check_new(args.to, "--to")
    path = hub.fetch(args.source) if args.source.startswith(hub.SCHEME) else local_path(args.source)
    imported = from_torch(read_tensors(path), args.source)
    for name, value in imported.params.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(
                f"'{args.source}' holds no float32 weights: '{name}' has dtype {value.dtype} or values that "
                "are not finite; convert a file of trained weights"
            )
    facts.check_sizes(path.parent, imported.depths, imported.dims)
    described = facts.read(path.parent)
    if args.image_size is not None:
        described["image_size"] = (args.image_size,)
    config = _config(imported, described, args.source)
    names = _class_names(
        imported.num_classes, args.class_names, described.get("class_names", ()), args.source
    )
    checkpoint.write(args.to, jax.tree.map(jnp.asarray, imported.params), make_metadata(config, names))
    result = {
        "out": str(args.to),
        "variant": imported.variant,
        "classes": imported.num_classes,
        "parameters": sum(math.prod(value.shape) for value in imported.params.values()),
        "naming": imported.naming,
        "image_size": list(image_hw(config)),
    }
    print(json.dumps(result))


def _config(imported: Imported, described: dict[str, Any], source: str) -> ConfigDict:
    """Returns the config of a run with this model, from its weights and the JSON files beside them."""
    config = defaults(_task(imported))
    model, data = config.model, config.data
    model.variant = imported.variant
    if imported.variant == "custom":
        model.depths, model.dims = imported.depths, imported.dims
    model.in_chans, model.patch_size = imported.in_chans, imported.patch_size
    if imported.has_decoder:
        model.decoder_dim, model.decoder_depth = imported.decoder_dim, imported.decoder_depth
    if imported.heads:
        scales = described.get("pool_scales", model.pool_scales)
        if len(scales) != imported.heads.pools:
            raise UserError(
                f"'{source}' pools at {imported.heads.pools} scales, which config.json beside it does not "
                f"name ({tuple(scales)}); put one there"
            )
        model.pool_scales = scales
        model.channels = imported.heads.channels
        model.auxiliary_channels = imported.heads.auxiliary_channels
    if imported.detector:
        model.channels, model.fc_channels = imported.detector.channels, imported.detector.fc_channels
        config.image_size = DETECTOR_SIZE
        data.eval_long, data.eval_short = described.get("eval_sides", (data.eval_long, data.eval_short))
    config.image_size = described.get("image_size", config.image_size)
    if imported.heads:
        data.eval_short = min(image_hw(config))
        data.eval_long = 4 * data.eval_short
    data.eval_crop = described.get("eval_crop", data.eval_crop)
    data.mean, data.std = described.get("mean", data.mean), described.get("std", data.std)
    if "dtype" in described:  # an export of ours, of arrays
        data.source, data.dtype, data.bands = "arrays", described["dtype"], ",".join(described["bands"])
    if len(data.mean) != imported.in_chans or len(data.std) != imported.in_chans:
        raise UserError(
            f"'{source}' takes images of {imported.in_chans} channel(s), whose mean and standard "
            "deviation are unknown; put a preprocessor_config.json with image_mean and image_std beside it"
        )
    check_ranges(config)
    check_keys(config)
    return config


def _task(imported: Imported) -> str:
    if imported.detector:
        return "detect"
    if imported.heads:
        return "segment"
    return "pretrain" if imported.has_decoder else "classify"


def _are_imagenets(names: tuple[str, ...]) -> bool:
    """Whether these are the names of ImageNet-1K's classes in their order, as on the hub: WordNet's synonyms.

    A few names on the hub have another spelling or another synonym.
    """
    pairs = zip(names, map(describe, CLASS_IDS), strict=True)
    same = sum(theirs.split(",")[0].strip().lower() == ours.lower() for theirs, ours in pairs)
    return same > 0.95 * len(names)


def _class_names(count: int, file: Path | None, described: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Returns a name for each class; see the help of --class-names.

    Raises:
      UserError: the file cannot be read, a name occurs twice, or there is not one name per class.
    """
    names, where = described, f"config.json beside '{source}'"
    if file is not None:
        where = f"'{file}'"
        try:
            names = tuple(file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read class names from '{file}': {error}") from None
        if not names and count:
            raise UserError(
                f"{where} holds no class names, the weights have {count} classes; give one name per line"
            )
    if names and len(names) != count:
        raise UserError(
            f"{where} holds {len(names)} class names, the weights have {count} classes; give {count} names "
            "with --class-names"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} holds the class name '{twice}' twice; give unique names with --class-names")
    if file is None and count == len(CLASS_IDS) and (not names or _are_imagenets(names)):
        return CLASS_IDS
    if names or not count:
        return names
    return tuple(f"class_{index:0{max(4, len(str(count - 1)))}}" for index in range(count))
