"""FCMAE: masking, masked encoder, decoder and reconstruction loss (paper, section 3; official `fcmae.py`)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.convnextv2 import STAGES, Block, Encoder, check_size
from cnx2_jax.models.layers import Linear, normal_init
from cnx2_jax.models.layouts import Dense, Gathered, Masked, from_patches, to_patches
from cnx2_jax.models.stack import run_blocks

MASK_STREAM = 0x6D61736B  # folded into a sample's key for its mask; far from any block's index
LAYOUTS: dict[str, tuple[type[Masked] | type[Gathered], ...]] = {
    "masked": (Masked,) * STAGES,
    "gathered": (Gathered,) * STAGES,
}
AUTO = "auto"

# What `auto` goes by: the largest share of visible patches at which each stage is gathered; above it, masked.
# Gathered work grows with the share, and at high resolution the borders of the visible cells are added to it.
# CPU: measured times; TPU: the compiler's estimated cycles (docs/performance.md); GPU: as TPU, not yet timed.
GATHERED_UP_TO = {
    "cpu": (0.95, 0.95, 0.95, 0.95),
    "tpu": (0.65, 0.65, 0.95, 0.95),
    "gpu": (0.65, 0.65, 0.95, 0.95),
}


def stage_kinds(layout: str, platform: str, share: float) -> tuple[type[Masked] | type[Gathered], ...]:
    """Returns how a key of `LAYOUTS`, or `auto` at this share of visible patches, holds each stage."""
    if layout != AUTO:
        return LAYOUTS[layout]
    limits = GATHERED_UP_TO.get(platform, GATHERED_UP_TO["gpu"])
    return tuple(Gathered if share <= most else Masked for most in limits)


class Output(NamedTuple):
    """What a forward pass of FCMAE gives.

    Attributes:
      loss: `[B]` float32, each sample's mean squared error over its masked patches.
      prediction: `[B, H/s, W/s, s*s*C]` float32, normalised pixels of every patch of the stride s.
      masked: `[B, H/s, W/s]`, True where the encoder saw nothing.
    """

    loss: Float[Array, " b"]
    prediction: Float[Array, "b h w p"]
    masked: Bool[Array, "b h w"]


def visible_count(patches: int, ratio: float) -> int:
    """Returns how many of `patches` stay visible: int(L * (1 - ratio)), the official rule.

    The small term keeps a product such as 5 * (1 - 0.8) = 0.9999... from losing its patch.
    """
    return int(patches * (1 - ratio) + 1e-6)


def random_mask(keys: Key[Array, " b"], grid: tuple[int, int], ratio: float) -> Bool[Array, "b rows columns"]:
    """Draws one mask `[B, rows, columns]` per key; every mask hides the same number of cells.

    Raises:
      UserError: the ratio leaves no cell visible.
    """
    cells = grid[0] * grid[1]
    visible = visible_count(cells, ratio) if 0 <= ratio < 1 else 0
    if not visible:
        raise UserError(
            f"mask_ratio {ratio} leaves {visible} of {cells} patches visible; "
            "use a ratio of at least 0 and below 1, larger images or a smaller mask_patch"
        )
    noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, MASK_STREAM), (cells,)))(keys)
    # The rank of a cell in the sorted noise decides; ranks, not values, so that the count is exact.
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return (rank >= visible).reshape(-1, *grid)


def patch_statistics(
    images: Float[Array, "b height width c"], patch: int
) -> tuple[Float[Array, "b h w p"], Float[Array, "b h w 1"], Float[Array, "b h w 1"]]:
    """Returns patches `[B, H/p, W/p, p*p*C]`, their mean and standard deviation, in float32 at least.

    Variance is unbiased (N - 1), with 1e-6 inside the root, as the official loss has it.
    """
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    patches = to_patches(images, patch)
    mean = patches.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
    return patches, mean, deviation


def paste(
    images: Float[Array, "b height width c"],
    prediction: Float[Array, "b h w p"],
    masked: Bool[Array, "b h w"],
) -> tuple[Float[Array, "b height width c"], Float[Array, "b height width c"]]:
    """Brings a prediction back to image space with the true mean and deviation of each patch.

    Returns:
      The reconstruction of every patch, and the images with it pasted into the masked patches.
    """
    patch = images.shape[1] // masked.shape[1]
    _, mean, deviation = patch_statistics(images, patch)
    reconstruction = from_patches(prediction * deviation + mean, patch)
    hidden = repeat(masked, "b h w -> b (h p) (w q) 1", p=patch, q=patch)
    return reconstruction, jnp.where(hidden, reconstruction, images)


class FCMAE(nnx.Module):
    """Fully convolutional masked autoencoder: a sparse encoder and a one-block dense decoder.

    Args:
      depths, dims, in_chans, patch_size, drop_path, remat, scan, dtype, rngs: see Encoder.
      mask_ratio: share of patches hidden.
      mask_patch: side of the hidden squares in pixels, a multiple of the total stride; 0 = the stride.
      decoder_dim, decoder_depth: channels and blocks of the decoder.
      layout: how the encoder holds its masked map: a key of `LAYOUTS`, or `auto`.
      platform: what `auto` chooses for: `cpu`, `tpu` or `gpu`, as which others count; by default JAX's
        default backend.

    Raises:
      UserError: `mask_patch` is no multiple of the stride, or the layout is unknown.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        mask_ratio: float = 0.6,
        mask_patch: int = 0,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        layout: str = AUTO,
        platform: str | None = None,
        in_chans: int = 3,
        patch_size: int = 4,
        drop_path: float = 0.0,
        remat: str = "none",
        scan: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        known = [*LAYOUTS, AUTO]
        if layout not in known:
            raise UserError(f"unknown layout '{layout}'{nearest(layout, known)} (known: {', '.join(known)})")
        self.encoder = Encoder(
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
        stride = self.encoder.stride
        if mask_patch < 0 or mask_patch % stride:
            raise UserError(f"mask_patch {mask_patch} is not a multiple of the stride {stride}")
        self.mask_patch = mask_patch or stride
        self.mask_ratio = mask_ratio
        self.layout = layout
        self.platform = platform or jax.default_backend()
        self.proj = Linear(dims[-1], decoder_dim, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(normal_init()(rngs.params(), (decoder_dim,)))
        self.decoder = nnx.List([Block(decoder_dim, dtype=dtype, rngs=rngs) for _ in range(decoder_depth)])
        self.pred = Linear(decoder_dim, stride * stride * in_chans, dtype=dtype, rngs=rngs)

    def mask(self, keys: Key[Array, " b"], height: int, width: int) -> Bool[Array, "b rows columns"]:
        """Draws masks for images of this size on the grid of the last stage (True = hidden).

        Raises:
          UserError: the sides are not multiples of `mask_patch`, or no patch would stay visible.
        """
        patch = self.mask_patch
        check_size(height, width, patch, "mask_patch" if patch != self.encoder.stride else "stride")
        coarse = random_mask(keys, (height // patch, width // patch), self.mask_ratio)
        cells = patch // self.encoder.stride
        return repeat(coarse, "b h w -> b (h p) (w q)", p=cells, q=cells)

    def layouts(
        self, masked: Bool[Array, "b rows columns"], *, drawn: bool = True
    ) -> list[Masked | Gathered]:
        """Returns the layout of every stage.

        Args:
          masked: masks on the grid of the last stage.
          drawn: whether they are as `mask` draws them: every sample hides the same number of whole squares of
            `mask_patch` pixels. Gathered stages have room for just the visible ones; for masks from
            elsewhere `auto` therefore holds every stage masked.

        Raises:
          UserError: masks from elsewhere do not fit layout `gathered`. Under jit, where they have no values,
            that cannot be seen, and the result is wrong.
        """
        cells = self.mask_patch // self.encoder.stride
        coarse = masked[:, ::cells, ::cells]
        visible = visible_count(coarse[0].size, self.mask_ratio)
        layout = "masked" if self.layout == AUTO and not drawn else self.layout
        kinds = stage_kinds(layout, self.platform, visible / coarse[0].size)
        if Gathered in kinds and not drawn and not isinstance(masked, jax.core.Tracer):
            whole = (repeat(coarse, "b h w -> b (h p) (w q)", p=cells, q=cells) == masked).all()
            if not whole or ((~coarse).sum(axis=(1, 2)) != visible).any():
                raise UserError(
                    f"layout 'gathered' takes masks that leave {visible} of {coarse[0].size} squares of "
                    f"{self.mask_patch} pixels visible in every image; use layout 'masked' for others"
                )
        scales = [2 ** (STAGES - 1 - stage) for stage in range(STAGES)]
        return [
            Gathered.from_mask(coarse, visible, cells * scale)
            if kind is Gathered
            else Masked.from_mask(masked, scale)
            for kind, scale in zip(kinds, scales, strict=True)
        ]

    def __call__(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"],
        masked: Bool[Array, "b rows columns"] | None = None,
        *,
        train: bool = True,
    ) -> Output:
        """Masks, encodes, decodes and scores a batch.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample, for its mask and its stochastic depth.
          masked: masks on the grid of the last stage to use instead of drawing them; see `layouts`.
          train: False switches stochastic depth off.
        """
        _, height, width, _ = images.shape
        drawn = masked is None
        if masked is None:
            masked = self.mask(keys, height, width)
        stride = self.encoder.stride
        x = self.encoder.features(images, keys if train else None, self.layouts(masked, drawn=drawn))[-1]

        x = self.proj(x)
        x = jnp.where(masked[..., None], self.mask_token[...].astype(x.dtype), x)
        x = run_blocks(self.decoder, x, Dense(), remat=self.encoder.remat, scan=self.encoder.scan)
        prediction = self.pred(x)
        prediction = prediction.astype(jnp.promote_types(prediction.dtype, jnp.float32))

        patches, mean, deviation = patch_statistics(images, stride)
        error = jnp.square(prediction - (patches - mean) / deviation).mean(axis=-1)
        hidden = jnp.maximum(masked.sum(axis=(1, 2)), 1)
        loss = jnp.where(masked, error, 0).sum(axis=(1, 2)) / hidden
        return Output(loss, prediction, masked)
