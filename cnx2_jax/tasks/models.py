"""Models from a run's config."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models import FCMAE, ConvNeXtV2, variant
from cnx2_jax.models.state import merge, split

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
