"""UperNet: semantic segmentation on a ConvNeXt V2 encoder, with an auxiliary head for training.

Behaviour and module names are those of mmsegmentation's `UPerHead` and `FCNHead` on the backbone of the
authors' `semantic_segmentation/`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cnx2_jax.errors import UserError
from cnx2_jax.kernels.convolution import conv
from cnx2_jax.models.convnextv2 import Encoder, EncoderConfig
from cnx2_jax.models.layers import BatchNorm, LayerNorm, dropout_channels
from cnx2_jax.models.layouts import Layout
from cnx2_jax.models.resampling import adaptive_pool, resize, resized_conv

# Folded into a sample's key to draw the dropout of each head; no block has these indices.
DROPOUT_STREAM = 0x64726F70
AUXILIARY_STREAM = 0x61757869
AUXILIARY_STAGE = 2

Maps = list[Float[Array, "b _h _w _c"]]


class Logits(NamedTuple):
    """Scores of each class, at the resolution of the stage that each head ends on; both float32.

    Attributes:
      main: `[B, H/p, W/p, classes]`, p being the encoder's `patch_size`.
      auxiliary: `[B, H/(4p), W/(4p), classes]`.
    """

    main: Float[Array, "b h w classes"]
    auxiliary: Float[Array, "b _h _w classes"]


class Backbone(Encoder):
    """The encoder with a LayerNorm on each stage's map."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.norm0, self.norm1, self.norm2, self.norm3 = (
            LayerNorm(dim, dtype=config.dtype) for dim in config.dims
        )

    def normalised(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"] | None = None,
        layouts: Sequence[Layout] | None = None,
    ) -> Maps:
        """Returns the four normalised maps; see `features` for the arguments and errors."""
        norms = (self.norm0, self.norm1, self.norm2, self.norm3)
        return [norm(x) for norm, x in zip(norms, self.features(images, keys, layouts), strict=True)]


class Conv(nnx.Module):
    """A convolution without bias that keeps the map's size; the kernel is `[size, size, in, out]`, size odd.

    It starts as mmcv's ConvModule does: `kaiming_init` with fan_out and ReLU's gain.
    """

    def __init__(self, size: int, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        initial = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(initial(rngs.params(), (size, size, features_in, features_out)))
        self.dtype = dtype

    def __call__(self, *maps: Float[Array, "b _h _w _c"]) -> Float[Array, "b _h _w o"]:
        """Convolves the maps as one: each resized to the first one's size, all channels concatenated.

        A convolution of a concatenation is the sum of those of its parts, each by its share of the kernel.
        """
        size = maps[0].shape[1], maps[0].shape[2]
        ends = list(itertools.accumulate(x.shape[-1] for x in maps))
        kernels = jnp.split(self.kernel[...].astype(self.dtype), ends[:-1], axis=2)
        parts = [_conv_at(x.astype(self.dtype), part, size) for x, part in zip(maps, kernels, strict=True)]
        return sum(parts[1:], parts[0])


def _conv_at(x: Array, kernel: Array, size: tuple[int, int]) -> Array:
    """Returns the convolution of the map resized to `size`."""
    if kernel.shape[:2] == (1, 1):
        return resize(x @ kernel[0, 0], size)
    return conv(x, kernel) if x.shape[1:3] == size else resized_conv(x, kernel, size)


class ConvModule(nnx.Module):
    """Convolution, BatchNorm and ReLU."""

    def __init__(self, size: int, features_in: int, features_out: int, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(size, features_in, features_out, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(features_out, dtype=dtype)

    def __call__(self, *maps: Float[Array, "b _h _w _c"], train: bool) -> Float[Array, "b _h _w o"]:
        """See `Conv` for several maps, and `BatchNorm` for `train`."""
        return nnx.relu(self.bn(self.conv(*maps), train))


class AdaptivePool(nnx.Module):
    """Averages a map over `bins` x `bins` bins."""

    def __init__(self, bins: int):
        self.bins = bins

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b bins bins c"]:
        return adaptive_pool(x, self.bins)


class Classifier(nnx.Module):
    """Dropout of whole channels, then a 1x1 convolution to the classes in float32.

    It starts as in mmsegmentation: normal with a deviation of 0.01.
    """

    def __init__(self, features: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        kernel = 0.01 * nnx.initializers.normal(1.0)(rngs.params(), (1, 1, features, num_classes))
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(num_classes))
        self.dtype = jnp.promote_types(dtype, jnp.float32)

    def __call__(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"] | None, rate: float, stream: int
    ) -> Float[Array, "b h w classes"]:
        x = x.astype(self.dtype)
        if keys is not None and rate:
            x = dropout_channels(x, keys, rate, stream)
        return x @ self.kernel[0, 0].astype(self.dtype) + self.bias[...].astype(self.dtype)


class UperHead(nnx.Module):
    """Pyramid pooling of the coarsest map, a top-down feature pyramid, and a classifier on all its levels."""

    def __init__(
        self,
        dims: tuple[int, ...],
        num_classes: int,
        *,
        channels: int,
        dropout: float,
        pool_scales: tuple[int, ...],
        dtype,
        rngs: nnx.Rngs,
    ):
        def module(size: int, features_in: int) -> ConvModule:
            return ConvModule(size, features_in, channels, dtype=dtype, rngs=rngs)

        *finer, last = dims
        self.dropout = dropout
        self.psp_modules = nnx.List(
            [nnx.List([AdaptivePool(scale), module(1, last)]) for scale in pool_scales]
        )
        self.bottleneck = module(3, last + len(pool_scales) * channels)
        self.lateral_convs = nnx.List([module(1, dim) for dim in finer])
        self.fpn_convs = nnx.List([module(3, channels) for _ in finer])
        self.fpn_bottleneck = module(3, len(dims) * channels)
        self.conv_seg = Classifier(channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Maps, keys: Key[Array, " b"] | None, train: bool
    ) -> Float[Array, "b _h _w classes"]:
        last = maps[-1]
        pooled = [module(pool(last), train=train) for pool, module in self.psp_modules]
        levels = [self.bottleneck(last, *pooled, train=train)]  # from coarse to fine
        for x, lateral in zip(maps[-2::-1], reversed(self.lateral_convs), strict=True):
            x = lateral(x, train=train)
            levels.append(x + resize(levels[-1], (x.shape[1], x.shape[2])))
        coarsest, *finer = levels
        found = [module(x, train=train) for module, x in zip(self.fpn_convs, reversed(finer), strict=True)]
        x = self.fpn_bottleneck(*found, coarsest, train=train)
        return self.conv_seg(x, keys, self.dropout, DROPOUT_STREAM)


class FCNHead(nnx.Module):
    """One 3x3 ConvModule and a classifier."""

    def __init__(self, dim: int, num_classes: int, *, channels: int, dropout: float, dtype, rngs: nnx.Rngs):
        self.dropout = dropout
        self.convs = nnx.List([ConvModule(3, dim, channels, dtype=dtype, rngs=rngs)])
        self.conv_seg = Classifier(channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], keys: Key[Array, " b"] | None, train: bool
    ) -> Float[Array, "b h w classes"]:
        for module in self.convs:
            x = module(x, train=train)
        return self.conv_seg(x, keys, self.dropout, AUXILIARY_STREAM)


class UperNet(nnx.Module):
    """Backbone, decoding head, and the auxiliary head on the third stage's map.

    Args:
      config: the encoder's options; the heads share `dtype`.
      num_classes: without an unlabelled class.
      channels: width of the decoding head.
      auxiliary_channels: width of the auxiliary head.
      dropout: share of the channels before each classifier that are dropped in training.
      pool_scales: bins along a side, of each level of pyramid pooling.
      rngs: the `params` stream initialises.

    Raises:
      UserError: an option is out of range.
    """

    encoder_prefix = "backbone."

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_classes: int,
        channels: int = 512,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        rngs: nnx.Rngs,
    ):
        sizes = {"num_classes": num_classes, "channels": channels, "auxiliary_channels": auxiliary_channels}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} {value} of UperNet must be at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout {dropout} must be at least 0 and less than 1")
        pool_scales = tuple(pool_scales)
        if not pool_scales or min(pool_scales) < 1:
            raise UserError(f"pool_scales {pool_scales} must be positive numbers, such as (1, 2, 3, 6)")
        self.num_classes = num_classes
        self.channels = channels
        self.auxiliary_channels = auxiliary_channels
        self.pool_scales = pool_scales
        self.backbone = Backbone(config, rngs=rngs)
        self.decode_head = UperHead(
            config.dims,
            num_classes,
            channels=channels,
            dropout=dropout,
            pool_scales=pool_scales,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.auxiliary_head = FCNHead(
            config.dims[AUXILIARY_STAGE],
            num_classes,
            channels=auxiliary_channels,
            dropout=dropout,
            dtype=config.dtype,
            rngs=rngs,
        )

    @property
    def config(self) -> EncoderConfig:
        """The encoder's options."""
        return self.backbone.config

    @property
    def stride(self) -> int:
        """Both sides of the images must be multiples of this."""
        return self.backbone.stride

    def __call__(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"] | None = None,
        train: bool = False,
    ) -> Logits:
        """Returns the logits of both heads; `resize` brings them to the size of the labels.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample; None switches stochastic depth and dropout off.
          train: whether BatchNorm uses the statistics of the batch, and updates its running averages.

        Raises:
          UserError: a side is not a multiple of the stride, or the images do not have `in_chans` channels.
          ValueError: see BatchNorm; a batch of one image has one value at pool scale 1.
        """
        maps = self.backbone.normalised(images, keys)
        main = self.decode_head(maps, keys, train)
        return Logits(main, self.auxiliary_head(maps[AUXILIARY_STAGE], keys, train))

    def segment(self, images: Float[Array, "b height width c"]) -> Float[Array, "b height width classes"]:
        """Returns the main logits at the images' size, for inference, without the auxiliary head.

        Raises:
          UserError: see `__call__`.
        """
        main = self.decode_head(self.backbone.normalised(images), None, False)
        return resize(main, (images.shape[1], images.shape[2]))
