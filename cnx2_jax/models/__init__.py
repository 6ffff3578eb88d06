"""ConvNeXt V2, FCMAE and UperNet as flax.nnx modules."""

import dataclasses

from flax import nnx

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.convnextv2 import VARIANTS, ConvNeXtV2, Encoder, EncoderConfig, variant
from cnx2_jax.models.fcmae import FCMAE
from cnx2_jax.models.upernet import UperNet

__all__ = [
    "FCMAE",
    "VARIANTS",
    "ConvNeXtV2",
    "Encoder",
    "EncoderConfig",
    "UperNet",
    "create_model",
    "variant",
]

FAMILIES = {"convnextv2": ConvNeXtV2, "fcmae": FCMAE, "upernet": UperNet}


def create_model(name: str, *, rngs: nnx.Rngs, **options) -> ConvNeXtV2 | FCMAE | UperNet:
    """Creates a model with fresh weights, such as `create_model("convnextv2_tiny", rngs=nnx.Rngs(0))`.

    Args:
      name: `convnextv2_VARIANT`, `fcmae_VARIANT` or `upernet_VARIANT`; the variants are the keys of
        `VARIANTS`.
      rngs: the `params` stream initialises.
      **options: fields of EncoderConfig, such as `in_chans`, and keyword arguments of ConvNeXtV2, FCMAE or
        UperNet, such as `num_classes`, which UperNet needs.

    Raises:
      UserError: the name is unknown, or an option is out of range.
    """
    family, _, size = name.partition("_")
    if family not in FAMILIES or size not in VARIANTS:
        known = [f"{kind}_{v}" for kind in FAMILIES for v in VARIANTS]
        raise UserError(f"unknown model '{name}'{nearest(name, known)} (known: {', '.join(known)})")
    chosen = VARIANTS[size]
    fields = {field.name for field in dataclasses.fields(EncoderConfig)}
    encoder = {key: value for key, value in options.items() if key in fields}
    others = {key: value for key, value in options.items() if key not in fields}
    return FAMILIES[family](EncoderConfig(chosen.depths, chosen.dims, **encoder), rngs=rngs, **others)
