"""ConvNeXt V2, FCMAE, UperNet and Mask R-CNN as flax.nnx modules."""

import dataclasses

from flax import nnx

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.convnextv2 import VARIANTS, ConvNeXtV2, Encoder, EncoderConfig, variant
from cnx2_jax.models.fcmae import FCMAE
from cnx2_jax.models.mask_rcnn import MaskRCNN
from cnx2_jax.models.upernet import UperNet

__all__ = [
    "FCMAE",
    "VARIANTS",
    "ConvNeXtV2",
    "Encoder",
    "EncoderConfig",
    "MaskRCNN",
    "UperNet",
    "create_model",
    "variant",
]

FAMILIES = {"convnextv2": ConvNeXtV2, "fcmae": FCMAE, "upernet": UperNet, "mask_rcnn": MaskRCNN}


def create_model(name: str, *, rngs: nnx.Rngs, **options) -> ConvNeXtV2 | FCMAE | UperNet | MaskRCNN:
    """Creates a model with fresh weights, such as `create_model("convnextv2_tiny", rngs=nnx.Rngs(0))`.

    Args:
      name: `convnextv2_VARIANT`, `fcmae_VARIANT`, `upernet_VARIANT` or `mask_rcnn_VARIANT`; the variants are
        the keys of `VARIANTS`.
      rngs: the `params` stream initialises.
      **options: fields of EncoderConfig, such as `in_chans`, and keyword arguments of the model, such
        as `num_classes`, which UperNet and MaskRCNN need.

    Raises:
      UserError: the name is unknown, or an option is out of range.
    """
    family, _, size = name.rpartition("_")
    if family not in FAMILIES or size not in VARIANTS:
        known = [f"{kind}_{v}" for kind in FAMILIES for v in VARIANTS]
        raise UserError(f"unknown model '{name}'{nearest(name, known)} (known: {', '.join(known)})")
    chosen = VARIANTS[size]
    fields = {field.name for field in dataclasses.fields(EncoderConfig)}
    encoder = {key: value for key, value in options.items() if key in fields}
    others = {key: value for key, value in options.items() if key not in fields}
    return FAMILIES[family](EncoderConfig(chosen.depths, chosen.dims, **encoder), rngs=rngs, **others)
