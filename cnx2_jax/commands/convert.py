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
from cnx2_jax.files import check_new
from cnx2_jax.interop import facts, hub
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import Imported, from_torch
from cnx2_jax.tasks.base import check_keys

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE|hf:OWNER/NAME",
        help="a .safetensors, .pt, .pth or .bin file in official, timm or Hugging Face naming, or a "
        "repository on the Hugging Face hub, with @REVISION if need be; config.json and "
        "preprocessor_config.json beside the weights are read too",
    )
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images; by default what config.json says, or 224",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="names of the classes, one a line; by default those in config.json, of 1000 classes ImageNet's, "
        "else class_0000 and so on",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    check_new(args.to, "--to")
    path = hub.fetch(args.source) if args.source.startswith(hub.SCHEME) else Path(args.source)
    imported = from_torch(read_tensors(path), args.source)
    for name, value in imported.params.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise UserError(
                f"'{args.source}' holds no weights: '{name}' is of {value.dtype}, or not all of it is finite"
            )
    facts.check_sizes(path.parent, imported.depths, imported.dims)
    told = facts.read(path.parent)
    if args.image_size is not None:
        told["image_size"] = (args.image_size,)
    config = _config(imported, told, args.source)
    names = _class_names(imported.num_classes, args.class_names, told.get("class_names", ()), args.source)
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


def _config(imported: Imported, told: dict[str, Any], source: str) -> ConfigDict:
    """Returns the config of a run with this model, as far as weights and what is told of them go."""
    config = defaults("pretrain" if imported.has_decoder else "classify")
    model, data = config.model, config.data
    model.variant = imported.variant
    if imported.variant == "custom":
        model.depths, model.dims = imported.depths, imported.dims
    model.in_chans, model.patch_size = imported.in_chans, imported.patch_size
    if imported.has_decoder:
        model.decoder_dim, model.decoder_depth = imported.decoder_dim, imported.decoder_depth
    config.image_size = told.get("image_size", config.image_size)
    data.eval_crop = told.get("eval_crop", data.eval_crop)
    data.mean, data.std = told.get("mean", data.mean), told.get("std", data.std)
    if len(data.mean) != imported.in_chans or len(data.std) != imported.in_chans:
        raise UserError(
            f"'{source}' takes images of {imported.in_chans} channel(s), and nothing says what normalises "
            "them; put a preprocessor_config.json with image_mean and image_std beside it"
        )
    check_ranges(config)
    check_keys(config)
    return config


def _are_imagenets(names: tuple[str, ...]) -> bool:
    """Whether these are ImageNet-1K's classes in their order, as the hub has them: WordNet's words for each.

    A few are spelt otherwise or told apart by another word.
    """
    pairs = zip(names, map(describe, CLASS_IDS), strict=True)
    same = sum(theirs.split(",")[0].strip().lower() == ours.lower() for theirs, ours in pairs)
    return same > 0.95 * len(names)


def _class_names(count: int, file: Path | None, told: tuple[str, ...], source: str) -> tuple[str, ...]:
    """Returns a name for each class; see the help of --class-names.

    Raises:
      UserError: the file cannot be read, or there are more or fewer names than classes.
    """
    names, where = told, f"config.json beside '{source}'"
    if file is not None:
        where = f"'{file}'"
        try:
            names = tuple(file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read class names from '{file}': {error}") from None
        if not names and count:
            raise UserError(f"{where} names no classes, the weights have {count}")
    if names and len(names) != count:
        raise UserError(
            f"{where} names {len(names)} classes, the weights have {count}; give {count} by --class-names"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} names more than one class '{twice}'; give others by --class-names")
    if file is None and count == len(CLASS_IDS) and (not names or _are_imagenets(names)):
        return CLASS_IDS
    if names or not count:
        return names
    return tuple(f"class_{index:0{max(4, len(str(count - 1)))}}" for index in range(count))
