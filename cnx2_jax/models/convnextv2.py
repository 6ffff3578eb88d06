"""ConvNeXt V2: the block, the encoder, the classifier and the table of variants.

Behaviour and module names are those of the official `models/convnextv2.py`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.kernels.bottleneck import Weights, inverted_bottleneck
from cnx2_jax.models.layers import (
    GRN,
    DepthwiseConv,
    LayerNorm,
    Linear,
    PatchConv,
    stochastic_depth,
)
from cnx2_jax.models.layouts import Dense, Layout, patches_between
from cnx2_jax.models.stack import check_remat, run_blocks

STAGES = 4
STEM_PATCHES = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Blocks and channels of each of the four stages."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]


VARIANTS = {
    # Paper, appendix A.1.
    "atto": Variant((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": Variant((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": Variant((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": Variant((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": Variant((3, 3, 27, 3), (96, 192, 384, 768)),  # timm convnextv2_small; not in the paper
    "base": Variant((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": Variant((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": Variant((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


def variant(name: str) -> Variant:
    """Returns the variant of this name.

    Raises:
      UserError: it does not exist; the message names the nearest one.
    """
    if name not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UserError(f"unknown variant '{name}'{nearest(name, VARIANTS)} (known: {known})")
    return VARIANTS[name]


class Block(nnx.Module):
    """The block of ConvNeXt V2 (paper, figure 5); `reference` spells it out."""

    def __init__(self, dim: int, *, dtype, rngs: nnx.Rngs):
        self.dwconv = DepthwiseConv(7, dim, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(dim, dtype=dtype)
        self.pwconv1 = Linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.grn = GRN(4 * dim, dtype=dtype)
        self.pwconv2 = Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b *any c"], layout: Layout, factor: Float[Array, " b"] | None = None
    ) -> Float[Array, "b *any c"]:
        """Adds the residual branch, times each sample's `factor`, to the map `x` held by `layout`.

        Equals `reference`, but runs the layers after the convolution as one kernel with its own gradient.
        """
        y = self.dwconv(x, layout)
        weights = Weights(
            self.norm.scale[...],
            self.norm.bias[...],
            self.pwconv1.kernel[...],
            self.pwconv1.bias[...],
            self.grn.gamma[...],
            self.grn.beta[...],
            self.pwconv2.kernel[...],
            self.pwconv2.bias[...],
        )
        y = inverted_bottleneck(_as_rows(y), layout.rows(), weights)
        return x + _scaled(y, factor).reshape(x.shape)

    def reference(
        self, x: Float[Array, "b *any c"], layout: Layout, factor: Float[Array, " b"] | None = None
    ) -> Float[Array, "b *any c"]:
        """Computes the block layer by layer, as figure 5 draws it; the tests compare `__call__` with it."""
        y = self.dwconv(x, layout)
        y = _as_rows(y)
        y = self.norm(y)
        y = self.pwconv1(y)
        y = jax.nn.gelu(y, approximate=False)
        y = self.grn(y, layout.rows())
        y = self.pwconv2(y)
        return x + _scaled(y, factor).reshape(x.shape)


def _as_rows(x: Array) -> Array:
    """Flattens a map to `[B, positions, C]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _scaled(rows: Array, factor: Array | None) -> Array:
    """Multiplies each sample `[N, C]` by its factor; None stands for ones."""
    return rows if factor is None else rows * factor[:, None, None].astype(rows.dtype)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The options of an Encoder; hashable, so that a module can keep it.

    Attributes:
      depths: blocks in each of the four stages.
      dims: channels of each stage.
      in_chans: channels of the images.
      patch_size: side of the stem's patches, 1, 2 or 4; the total stride is 8 times this.
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first block.
      remat: what the backward pass recomputes; see `run_blocks`.
      scan: compiles each stage's block once; see `run_blocks`.
      dtype: compute dtype; parameters are always float32.

    Raises:
      UserError: `depths` or `dims` is not four positive numbers, `in_chans` is not positive, or `patch_size`,
        `drop_path` or `remat` is out of range.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int = 3
    patch_size: int = 4
    drop_path: float = 0.0
    remat: str = "none"
    scan: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("depths", "dims"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list would not be hashable
        if (
            len(self.depths) != STAGES
            or len(self.dims) != STAGES
            or min(*self.depths, *self.dims, self.in_chans) < 1
        ):
            raise UserError(
                f"depths {self.depths}, dims {self.dims}, in_chans {self.in_chans}: "
                "give four positive depths, four positive dims and at least one channel"
            )
        if self.patch_size not in STEM_PATCHES:
            raise UserError(f"patch_size {self.patch_size} of the stem must be one of {STEM_PATCHES}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path {self.drop_path} must be at least 0 and less than 1")
        check_remat(self.remat)

    @property
    def drop_rates(self) -> tuple[float, ...]:
        """The stochastic depth rate of every block."""
        total = sum(self.depths)
        return tuple(self.drop_path * index / max(total - 1, 1) for index in range(total))


class Encoder(nnx.Module):
    """Stem, four stages and the down-sampling between them; no final norm, no head.

    Args:
      config: the options, kept as `self.config`.
      rngs: the `params` stream initialises.

    Attributes:
      encoder_prefix: what precedes the encoder's parameters in this class's dotted names. Every model with
        an encoder declares it; layer-wise learning rates read it.
    """

    encoder_prefix = ""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        dims, dtype = config.dims, config.dtype
        stem = nnx.List(
            [
                PatchConv(config.patch_size, config.in_chans, dims[0], dtype=dtype, rngs=rngs),
                LayerNorm(dims[0], dtype=dtype),
            ]
        )
        self.downsample_layers = nnx.List([stem])
        for fine, coarse in itertools.pairwise(dims):
            layers = [
                LayerNorm(fine, dtype=dtype),
                PatchConv(2, fine, coarse, dtype=dtype, rngs=rngs),
            ]
            self.downsample_layers.append(nnx.List(layers))

        self.stages: nnx.List = nnx.List(
            [
                nnx.List([Block(dim, dtype=dtype, rngs=rngs) for _ in range(depth)])
                for depth, dim in zip(config.depths, dims, strict=True)
            ]
        )

    @property
    def stride(self) -> int:
        """Image pixels per position of the last stage, along one side."""
        return self.config.patch_size * 2 ** (STAGES - 1)

    def features(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"] | None = None,
        layouts: Sequence[Layout] | None = None,
    ) -> list[Float[Array, "b _h _w _c"]]:
        """Returns the four stage maps `[B, H / (p 2^i), W / (p 2^i), dims[i]]` in the compute dtype.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample; None switches stochastic depth off.
          layouts: one per stage, which says where the pixels of its map are stored; plain maps by default.

        Raises:
          UserError: a side is not a multiple of the stride, or the images do not have `in_chans` channels.
        """
        config = self.config
        _, height, width, channels = images.shape
        check_size(height, width, self.stride)
        if channels != config.in_chans:
            raise UserError(f"images have {channels} channels, the model takes {config.in_chans}")
        layouts = layouts or [Dense()] * STAGES
        factors = None
        if keys is not None and config.drop_path:
            factors = stochastic_depth(keys, config.drop_rates)
        maps, blocks_before = [], 0
        for stage, (down, blocks, layout) in enumerate(
            zip(self.downsample_layers, self.stages, layouts, strict=True)
        ):
            if stage == 0:
                conv, norm = down
                x = norm(conv(layout.enter(images, config.patch_size)))
            else:
                norm, conv = down
                x = conv(patches_between(norm(x), layouts[stage - 1], layout))
            blocks_after = blocks_before + len(blocks)
            stage_factors = None if factors is None else factors[blocks_before:blocks_after]
            x = run_blocks(blocks, x, layout, stage_factors, remat=config.remat, scan=config.scan)
            maps.append(layout.leave(x))
            blocks_before = blocks_after
        return maps


class ConvNeXtV2(Encoder):
    """The classifier: encoder, mean over positions, LayerNorm, linear head.

    Args:
      config: the encoder's options.
      num_classes: 0 leaves the head out; the model then returns the normalised mean `[B, dims[3]]`.
      head_init_scale: factor on the head's initial kernel.
      rngs: the `params` stream initialises.

    Raises:
      UserError: `num_classes` is negative.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, rngs=rngs)
        if num_classes < 0:
            raise UserError(f"num_classes {num_classes} must be at least 0; 0 leaves the head out")
        # The last layers run in float32 whatever the encoder's dtype: they cost nothing, and the loss
        # sees logits that bfloat16 has not rounded.
        dtype = jnp.promote_types(config.dtype, jnp.float32)
        self.norm = LayerNorm(config.dims[-1], dtype=dtype)
        self.num_classes = num_classes
        if num_classes:
            self.head = Linear(config.dims[-1], num_classes, dtype=dtype, rngs=rngs)
            self.head.kernel[...] *= head_init_scale

    def __call__(
        self, images: Float[Array, "b height width c"], keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b classes"]:
        """Returns logits `[B, num_classes]` in float32; see `features` for the arguments and errors."""
        x = self.pooled(images, keys)
        return self.head(x) if self.num_classes else x

    def pooled(
        self, images: Float[Array, "b height width c"], keys: Key[Array, " b"] | None = None
    ) -> Float[Array, "b dim"]:
        """Returns the head's input, the normalised mean over positions: `[B, dims[3]]` in float32."""
        x = self.features(images, keys)[-1]
        return self.norm(x.mean(axis=(1, 2), dtype=self.norm.dtype))


def check_size(height: int, width: int, multiple: int, of: str = "stride") -> None:
    """Raises UserError unless both sides are positive multiples of `multiple`; `of` names it in the error."""
    if height % multiple or width % multiple or not height or not width:
        near = [max(1, math.floor(side / multiple + 0.5)) * multiple for side in (height, width)]
        raise UserError(
            f"image size {height}x{width} is not a multiple of the {of} {multiple}; "
            f"the nearest that is: {near[0]}x{near[1]}"
        )
