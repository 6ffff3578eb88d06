"""The heads on regions: classes and boxes (arXiv 1612.03144), and masks (arXiv 1703.06870)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cnx2_jax.models.mask_rcnn.layers import Conv, ConvModule, FullyConnected, Upsample, kaiming, xavier

BOX_BINS = 7
MASK_BINS = 14
MASK_SIDE = 2 * MASK_BINS


class BoxOutputs(NamedTuple):
    """What the box head returns for each region; both float32 or wider.

    Attributes:
      logits: of all classes, and last of the background, `[B, R, classes + 1]`.
      deltas: from the region to the object's box if it is of this class, `[B, R, classes, 4]`; see boxes.py.
    """

    logits: Float[Array, "b r scores"]
    deltas: Float[Array, "b r classes 4"]


class BBoxHead(nnx.Module):
    """Two fully connected layers, then the logits of all classes and the deltas for each."""

    def __init__(self, channels: int, fc_channels: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        wide = jnp.promote_types(dtype, jnp.float32)
        normal = nnx.initializers.normal
        shapes = [(BOX_BINS, BOX_BINS, channels), (fc_channels,)]
        self.shared_fcs = nnx.List(
            [FullyConnected(shape, fc_channels, xavier, dtype=dtype, rngs=rngs) for shape in shapes]
        )
        self.fc_cls = FullyConnected((fc_channels,), num_classes + 1, normal(0.01), dtype=wide, rngs=rngs)
        self.fc_reg = FullyConnected((fc_channels,), 4 * num_classes, normal(0.001), dtype=wide, rngs=rngs)

    def __call__(self, regions: Float[Array, "b r bins bins c"]) -> BoxOutputs:
        x = regions
        for layer in self.shared_fcs:
            x = nnx.relu(layer(x))
        deltas = self.fc_reg(x)
        return BoxOutputs(self.fc_cls(x), deltas.reshape(*deltas.shape[:2], -1, 4))


class MaskHead(nnx.Module):
    """Four 3x3 convolutions, a doubling of the resolution, and a mask for each class."""

    def __init__(self, channels: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        wide = jnp.promote_types(dtype, jnp.float32)
        self.convs = nnx.List(
            [ConvModule(3, channels, channels, kaiming, dtype=dtype, rngs=rngs) for _ in range(4)]
        )
        self.upsample = Upsample(channels, channels, dtype=dtype, rngs=rngs)
        self.conv_logits = Conv(1, channels, num_classes, kaiming, dtype=wide, rngs=rngs)

    def __call__(
        self, regions: Float[Array, "b r bins bins c"], classes: Int[Array, "b r"]
    ) -> Float[Array, "b r side side"]:
        """Returns the logits of the mask of one class per region; float32 or wider."""
        x = regions.reshape(-1, *regions.shape[2:])
        for module in self.convs:
            x = nnx.relu(module(x))
        x = nnx.relu(self.upsample(x))
        final = self.conv_logits
        x = x.reshape(*classes.shape, *x.shape[1:]).astype(final.dtype)
        kernel = final.kernel[0, 0].astype(final.dtype).T[classes]  # [B, R, C]
        logits = jnp.einsum("brpqc,brc->brpq", x, kernel)
        return logits + final.bias[...].astype(final.dtype)[classes][..., None, None]


class RoIHead(nnx.Module):
    """The heads on regions, under mmdetection's names."""

    def __init__(self, channels: int, fc_channels: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        self.bbox_head = BBoxHead(channels, fc_channels, num_classes, dtype=dtype, rngs=rngs)
        self.mask_head = MaskHead(channels, num_classes, dtype=dtype, rngs=rngs)
