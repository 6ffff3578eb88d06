"""Models from a run's config."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig, MaskRCNN, UperNet, variant
from cnx2_jax.models.state import merge, split

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(
    config: ConfigDict, num_classes: int, rngs: nnx.Rngs, platform: str | None = None
) -> ConvNeXtV2 | FCMAE:
    """Builds the model of a run: FCMAE for pretraining, else a classifier.

    Args:
      config: the run's.
      num_classes: of the classifier.
      rngs: the `params` stream initialises.
      platform: where `auto` in `model.layout` and `model.scan` expects to run: `cpu`, `tpu` or `gpu`; by
        default JAX's default backend.

    Raises:
      UserError: see `encoder_config` and the models.
    """
    model = config.model
    platform = platform or jax.default_backend()
    encoder = encoder_config(config, platform)
    if config.task == "pretrain":
        names = ("mask_ratio", "mask_patch", "decoder_dim", "decoder_depth", "layout")
        options = {name: model[name] for name in names}
        return FCMAE(encoder, platform=platform, rngs=rngs, **options)
    return ConvNeXtV2(encoder, num_classes=num_classes, head_init_scale=model.head_init_scale, rngs=rngs)


def encoder_config(config: ConfigDict, platform: str | None = None) -> EncoderConfig:
    """Returns the options of a run's encoder.

    Args:
      config: the run's.
      platform: see `build`.

    Raises:
      UserError: an unknown variant, dtype or scan mode; see EncoderConfig.
    """
    model = config.model
    depths, dims = _sizes(model)
    if model.dtype not in DTYPES:
        hint = nearest(model.dtype, DTYPES)
        raise UserError(f"unknown model.dtype '{model.dtype}'{hint} (known: {', '.join(DTYPES)})")
    return EncoderConfig(
        depths,
        dims,
        in_chans=model.in_chans,
        patch_size=model.patch_size,
        drop_path=model.drop_path,
        remat=model.remat,
        scan=_scan(model.scan, platform or jax.default_backend()),
        dtype=DTYPES[model.dtype],
    )


def _scan(choice: str, platform: str) -> bool:
    """Returns whether stages are scanned; `auto` does on CPUs alone (docs/performance.md)."""
    known = {"auto": platform == "cpu", "on": True, "off": False}
    if choice not in known:
        raise UserError(f"unknown model.scan '{choice}'{nearest(choice, known)} (known: {', '.join(known)})")
    return known[choice]


def _sizes(model: ConfigDict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns depths and dims."""
    if model.variant != "custom":
        variant(model.variant)  # raises for an unknown name, which comes before any other mistake
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


def without_decoder(model: ConvNeXtV2 | FCMAE | UperNet | MaskRCNN) -> ConvNeXtV2:
    """Returns a classifier unchanged, and any other model's encoder with a fresh final norm and no head.

    So whatever takes a classifier takes every encoder; the output of one without a head is features
    `[B, dims[3]]`.
    """
    if isinstance(model, ConvNeXtV2):
        return model
    encoder = model.encoder if isinstance(model, FCMAE) else model.backbone
    config = encoder.config
    empty = nnx.eval_shape(lambda: ConvNeXtV2(config, num_classes=0, rngs=nnx.Rngs(0)))
    graph, like = split(empty)
    stored = {name: array for name, array in split(encoder)[1].items() if name in like}
    fresh = {"norm.scale": jnp.ones(config.dims[-1]), "norm.bias": jnp.zeros(config.dims[-1])}
    return merge(graph, {**stored, **fresh})
