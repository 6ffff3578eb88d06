"""What the tasks share: models from configs and cards, normalisation, starting weights."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.configuration import from_json, image_hw
from cnx2_jax.data.pipeline import ImageData
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.interop import program
from cnx2_jax.models import FCMAE, ConvNeXtV2, variant
from cnx2_jax.models.convnextv2 import check_size
from cnx2_jax.train import checkpoint
from cnx2_jax.train.state import Params, merge, split

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def normalise(images: UInt8[Array, "b height width c"], data: ConfigDict) -> Float[Array, "b height width c"]:
    """Maps uint8 images to float32: (x / 255 - mean) / std per channel."""
    return program.normalise(images, data.mean, data.std)  # the very one that leaves with the weights


def denormalise(
    images: Float[Array, "b height width c"], data: ConfigDict
) -> UInt8[Array, "b height width c"]:
    """Inverse of `normalise`, rounded and clipped to uint8."""
    images = (images * jnp.array(data.std) + jnp.array(data.mean)) * 255
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def check(config: ConfigDict) -> None:
    """Checks what a model can only refuse late: size, channels and normalisation against each other.

    Raises:
      UserError: the image size is no multiple of the stride, or a tuple has not one value per channel.
    """
    model, data = config.model, config.data
    check_size(*image_hw(config), 8 * model.patch_size)
    for name in ("mean", "std"):
        if len(data[name]) != model.in_chans:
            raise UserError(
                f"data.{name} has {len(data[name])} value(s) for model.in_chans {model.in_chans}; give one "
                "per channel"
            )
    if not 0 <= min(data.mean) <= max(data.mean) <= 1:
        raise UserError(f"data.mean {tuple(data.mean)} must be shares of the full range, from 0 to 1")
    if min(data.std) <= 0:
        raise UserError(f"data.std {tuple(data.std)} must be above 0")
    for name in ("crop_scale", "crop_ratio"):
        if len(data[name]) != 2 or not 0 < data[name][0] <= data[name][1]:
            raise UserError(f"data.{name} {tuple(data[name])} must be two numbers above 0, the smaller first")


def open_images(config: ConfigDict) -> ImageData:
    """Opens the images of a config.

    Raises:
      UserError: they cannot be opened (see ImageData), or there are none to evaluate on.
    """
    images = ImageData(config)
    if not images.num_val:
        raise UserError(
            f"no validation images with data.val_fraction {config.data.val_fraction}; raise it, or put some "
            "into a folder val/ beside train/"
        )
    return images


def build(
    config: ConfigDict, num_classes: int, rngs: nnx.Rngs, platform: str | None = None
) -> ConvNeXtV2 | FCMAE:
    """Builds the model of a run: FCMAE for pretraining, else a classifier.

    Args:
      config: the run's.
      num_classes: of the classifier.
      rngs: give the initial parameters.
      platform: what `auto` chooses for in `model.layout` and `model.scan`: `cpu`, `tpu` or `gpu`; by default
        JAX's default backend.

    Raises:
      UserError: see the models, and an unknown dtype.
    """
    model = config.model
    platform = platform or jax.default_backend()
    depths, dims = _sizes(model)
    if model.dtype not in DTYPES:
        hint = nearest(model.dtype, DTYPES)
        raise UserError(f"unknown model.dtype '{model.dtype}'{hint} (known: {', '.join(DTYPES)})")
    options = {
        "in_chans": model.in_chans,
        "patch_size": model.patch_size,
        "drop_path": model.drop_path,
        "remat": model.remat,
        "scan": _scan(model.scan, platform),
        "dtype": DTYPES[model.dtype],
        "rngs": rngs,
    }
    if config.task == "pretrain":
        names = ("mask_ratio", "mask_patch", "decoder_dim", "decoder_depth", "layout")
        masking = {name: model[name] for name in names}
        return FCMAE(depths, dims, platform=platform, **masking, **options)
    return ConvNeXtV2(
        depths,
        dims,
        num_classes=num_classes,
        head_init_scale=model.head_init_scale,
        **options,
    )


def _scan(choice: str, platform: str) -> bool:
    """Whether stages are scanned; `auto` scans but on TPU, where loops cost time (docs/performance.md)."""
    known = {"auto": platform != "tpu", "on": True, "off": False}
    if choice not in known:
        raise UserError(f"unknown model.scan '{choice}'{nearest(choice, known)} (known: {', '.join(known)})")
    return known[choice]


def _sizes(model: ConfigDict) -> tuple[Sequence[int], Sequence[int]]:
    """Returns depths and dims."""
    if model.variant != "custom":
        variant(model.variant)  # an unknown name is the first thing to say
    given = bool(model.depths or model.dims)
    if (model.variant == "custom") != given:
        raise UserError(
            f"model.variant '{model.variant}' with depths {tuple(model.depths)}, dims {tuple(model.dims)}: "
            "give both with model.variant=custom, and neither with a named variant"
        )
    if given:
        return model.depths, model.dims
    named = variant(model.variant)
    return named.depths, named.dims


def make_card(config: ConfigDict, class_names: tuple[str, ...]) -> dict:
    """Returns what travels with the weights, as JSON."""
    return {"format": "cnx2_jax 1", "class_names": list(class_names), "config": config.to_dict()}


def load(path: Path) -> tuple[ConvNeXtV2 | FCMAE, ConfigDict, tuple[str, ...]]:
    """Loads a model with its config and class names from a checkpoint (see `checkpoint.find`).

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    folder = checkpoint.find(path)
    card = checkpoint.read_card(folder)
    try:
        config, class_names = from_json(card["config"]), tuple(card["class_names"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint '{path}' is damaged: its config cannot be read ({error})") from None
    empty = nnx.eval_shape(lambda: build(config, len(class_names), nnx.Rngs(0)))
    graph, like = split(empty)
    params = checkpoint.read_params(folder)
    check_params(params, like, str(path))
    return merge(graph, params), config, class_names


def without_decoder(model: ConvNeXtV2 | FCMAE) -> ConvNeXtV2:
    """Returns a classifier as it is, and of an FCMAE its encoder, with a fresh final norm and no head.

    So everything that takes a classifier takes a pretrained encoder: it gives features `[B, dims[3]]`.
    """
    if isinstance(model, ConvNeXtV2):
        return model
    encoder = model.encoder
    depths = [len(blocks) for blocks in encoder.stages]
    dtype = encoder.stages[0][0].norm.dtype
    empty = nnx.eval_shape(
        lambda: ConvNeXtV2(
            depths,
            encoder.dims,
            num_classes=0,
            in_chans=encoder.in_chans,
            patch_size=encoder.patch_size,
            scan=encoder.scan,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    graph, _ = split(empty)
    fresh = {"norm.scale": jnp.ones(encoder.dims[-1]), "norm.bias": jnp.zeros(encoder.dims[-1])}
    return merge(graph, {**split(encoder)[1], **fresh})


def check_params(params: Params, like: Params, source: str) -> None:
    """Raises UserError unless `params` has the names of `like`, no others, and the same shapes."""
    for name, leaf in like.items():
        if name not in params:
            raise UserError(f"checkpoint '{source}' has no parameter '{name}': it is of another model")
        if params[name].shape != leaf.shape:
            raise UserError(
                f"checkpoint '{source}' is of another model: '{name}' is {params[name].shape} there and "
                f"{leaf.shape} here; check model.variant, depths, dims, in_chans and patch_size"
            )
    surplus = sorted(params.keys() - like.keys())
    if surplus:
        raise UserError(f"checkpoint '{source}' is of another model: '{surplus[0]}' has no place here")


def check_class_names(theirs: dict, ours: dict, source: str) -> None:
    """Raises UserError unless two cards name the same classes, or the checkpoint's names none."""
    stored, here = theirs.get("class_names"), ours["class_names"]
    if stored and here and stored != here:
        place = next(
            (i for i, pair in enumerate(zip(stored, here, strict=False)) if pair[0] != pair[1]), None
        )
        difference = f"{len(stored)} classes there, {len(here)} here"
        if place is not None:
            difference = f"class {place} is '{stored[place]}' there and '{here[place]}' here"
        raise UserError(f"checkpoint '{source}' was trained on other classes: {difference}; check data.root")


def starting_params(
    path: Path, config: ConfigDict, fresh: Params, class_names: tuple[str, ...] = ()
) -> Params:
    """Returns `fresh` with the encoder's parameters taken from a checkpoint.

    From an FCMAE checkpoint the encoder, the final norm and the head staying fresh; from a classifier
    everything but a head of another class count, or of classes of other names than `class_names`.

    Raises:
      UserError: there is no checkpoint, or it is of another variant.
    """
    folder = checkpoint.find(path)
    card = checkpoint.read_card(folder)
    theirs, ours = card["config"]["model"]["variant"], config.model.variant
    if theirs != ours:
        raise UserError(
            f"checkpoint '{path}' holds variant '{theirs}', the config asks for '{ours}'; "
            f"set model.variant={theirs} or choose another init_from"
        )
    stored = checkpoint.read_params(folder)
    pretrained = any(name.startswith("encoder.") for name in stored)
    if pretrained:
        prefix = "encoder."
        stored = {n.removeprefix(prefix): value for n, value in stored.items() if n.startswith(prefix)}
    others = bool(class_names and card["class_names"]) and tuple(card["class_names"]) != class_names
    mine = ("norm.", "head.") if pretrained else ("head.",) if others else ()
    own = {
        name
        for name in fresh
        if name.startswith(mine)
        or (name.startswith("head.") and (name not in stored or stored[name].shape != fresh[name].shape))
    }
    taken = {name: leaf for name, leaf in stored.items() if name not in own}
    check_params(taken, {name: leaf for name, leaf in fresh.items() if name not in own}, str(path))
    return {name: leaf if name in own else jax.device_get(stored[name]) for name, leaf in fresh.items()}


def check_new(path: Path, option: str) -> None:
    """Raises UserError if no new file can be made there, before the work of which it is to tell.

    Something is there already, or its folder cannot be made or written to. `option` gave the path.
    """
    if os.path.lexists(path):
        raise UserError(f"'{path}' exists already; nothing was overwritten, choose another {option}")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"cannot write '{path}': '{folder}' is no folder, or may not be written to")


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
