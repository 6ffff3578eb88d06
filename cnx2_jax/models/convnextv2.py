"""ConvNeXt V2: the block, the encoder, the classifier and the table of variants.

Keeps the behaviour and the module names of the official `models/convnextv2.py`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

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
    """Looks a variant up by name; UserError names the nearest one."""
    if name not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UserError(f"unknown variant '{name}'{nearest(name, VARIANTS)} (known: {known})")
    return VARIANTS[name]


class Block(nnx.Module):
    """dwconv 7x7 -> LayerNorm -> Linear x4 -> GELU -> GRN -> Linear, plus the input (paper, figure 5)."""

    def __init__(self, dim: int, *, dtype, rngs: nnx.Rngs):
        self.dwconv = DepthwiseConv(7, dim, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(dim, dtype=dtype)
        self.pwconv1 = Linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.grn = GRN(4 * dim, dtype=dtype)
        self.pwconv2 = Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b *any c"], layout: Layout, factor: Float[Array, " b"] | None = None
    ) -> Float[Array, "b *any c"]:
        """Adds the residual branch, times each sample's `factor`, to a map that `layout` holds.

        The layers after the convolution run as one kernel with a gradient of its own.
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
        y = inverted_bottleneck(y.reshape(y.shape[0], -1, y.shape[-1]), layout.rows(), weights)
        if factor is not None:
            y *= factor[:, None, None].astype(y.dtype)
        return x + y.reshape(x.shape)


class Encoder(nnx.Module):
    """Stem, four stages and the down-sampling between them; no final norm, no head.

    Args:
      depths: blocks in each stage.
      dims: channels of each stage.
      in_chans: channels of the images.
      patch_size: side of the stem's patches, 1, 2 or 4; the total stride is 8 times this.
      drop_path: rate of stochastic depth at the last block; it grows linearly from 0 at the first.
      remat: what is computed anew in the backward pass; see `run_blocks`.
      scan: compiles each stage's block once; see `run_blocks`.
      dtype: compute dtype; parameters are float32 whatever it is.
      rngs: the `params` stream initialises.

    Raises:
      UserError: four stages are not given, the stem's patch size is none of 1, 2, 4, or another option is
        none of its values.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        in_chans: int = 3,
        patch_size: int = 4,
        drop_path: float = 0.0,
        remat: str = "none",
        scan: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != STAGES or len(dims) != STAGES or min(*depths, *dims, in_chans) < 1:
            raise UserError(
                f"depths {tuple(depths)}, dims {tuple(dims)}, in_chans {in_chans}: "
                "give four positive depths, four positive dims and at least one channel"
            )
        if patch_size not in STEM_PATCHES:
            raise UserError(f"patch_size {patch_size} of the stem must be one of {STEM_PATCHES}")
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path {drop_path} must be at least 0 and less than 1")
        check_remat(remat)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.dims = tuple(dims)
        total = sum(depths)
        self.drop_rates = tuple(drop_path * index / max(total - 1, 1) for index in range(total))
        self.remat = remat
        self.scan = scan

        stem = nnx.List(
            [
                PatchConv(patch_size, in_chans, dims[0], dtype=dtype, rngs=rngs),
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
                for depth, dim in zip(depths, dims, strict=True)
            ]
        )

    @property
    def stride(self) -> int:
        """Image pixels per position of the last stage, along one side."""
        return self.patch_size * 2 ** (STAGES - 1)

    def features(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"] | None = None,
        layouts: Sequence[Layout] | None = None,
    ) -> list[Float[Array, "b _h _w _c"]]:
        """Returns the four stage maps `[B, H / (p 2^i), W / (p 2^i), dims[i]]` in the compute dtype.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample switches stochastic depth on.
          layouts: where the pixels of each stage live; plain maps by default.

        Raises:
          UserError: the sides are not multiples of the stride, or the channels are not `in_chans`.
        """
        _, height, width, channels = images.shape
        check_size(height, width, self.stride)
        if channels != self.in_chans:
            raise UserError(f"images have {channels} channels, the model takes {self.in_chans}")
        layouts = layouts or [Dense()] * STAGES
        factors = (
            stochastic_depth(keys, self.drop_rates) if keys is not None and any(self.drop_rates) else None
        )
        maps, done = [], 0
        for stage, (down, blocks, layout) in enumerate(
            zip(self.downsample_layers, self.stages, layouts, strict=True)
        ):
            if stage == 0:
                conv, norm = down
                x = norm(conv(layout.enter(images, self.patch_size)))
            else:
                norm, conv = down
                x = conv(patches_between(norm(x), layouts[stage - 1], layout))
            own = None if factors is None else factors[done : done + len(blocks)]
            x = run_blocks(blocks, x, layout, own, remat=self.remat, scan=self.scan)
            maps.append(layout.leave(x))
            done += len(blocks)
        return maps


class ConvNeXtV2(Encoder):
    """The classifier: encoder, mean over positions, LayerNorm, linear head.

    Args (besides the Encoder's):
      num_classes: 0 leaves the head out, and the model returns the normalised mean `[B, dims[3]]`.
      head_init_scale: factor on the head's initial weights.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        num_classes: int = 1000,
        head_init_scale: float = 1.0,
        in_chans: int = 3,
        patch_size: int = 4,
        drop_path: float = 0.0,
        remat: str = "none",
        scan: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            depths,
            dims,
            in_chans=in_chans,
            patch_size=patch_size,
            drop_path=drop_path,
            remat=remat,
            scan=scan,
            dtype=dtype,
            rngs=rngs,
        )
        # The last layers run in float32 whatever the encoder's dtype: they cost nothing, and the loss
        # sees logits that bfloat16 has not rounded.
        dtype = jnp.promote_types(dtype, jnp.float32)
        self.norm = LayerNorm(dims[-1], dtype=dtype)
        if num_classes < 0:
            raise UserError(f"num_classes {num_classes} must be at least 0; 0 leaves the head out")
        self.num_classes = num_classes
        if num_classes:
            self.head = Linear(dims[-1], num_classes, dtype=dtype, rngs=rngs)
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
        """Returns what the head sees, the normalised mean over positions: `[B, dims[3]]` in float32."""
        x = self.features(images, keys)[-1]
        return self.norm(x.mean(axis=(1, 2), dtype=self.norm.dtype))


def check_size(height: int, width: int, multiple: int, of: str = "stride") -> None:
    """Raises UserError unless both sides are multiples of this; `of` says what it is."""
    if height % multiple or width % multiple or not height or not width:
        near = [max(1, math.floor(side / multiple + 0.5)) * multiple for side in (height, width)]
        raise UserError(
            f"image size {height}x{width} is not a multiple of the {of} {multiple}; "
            f"the nearest that is: {near[0]}x{near[1]}"
        )
