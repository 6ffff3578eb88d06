"""FCMAE: masking, masked encoder, decoder and reconstruction loss (paper, section 3; official `fcmae.py`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.kernels.pointwise import widened
from cnx2_jax.models.convnextv2 import STAGES, Block, Encoder, EncoderConfig, check_size
from cnx2_jax.models.layers import Linear, normal_init
from cnx2_jax.models.layouts import Dense, Gathered, Masked, from_patches, to_patches
from cnx2_jax.models.stack import run_blocks

MASK_STREAM = 0x6D61736B  # folded into a sample's key to draw its mask; no block has this index
LAYOUTS: dict[str, tuple[type[Masked] | type[Gathered], ...]] = {
    "masked": (Masked,) * STAGES,
    "gathered": (Gathered,) * STAGES,
}
AUTO = "auto"

# `auto` gathers a stage up to this share of visible patches, and masks it above. The cost of gathering grows
# with the share, and at high resolution the borders of the visible cells add to it.
# CPU and GPU (an H200): measured times; TPU: the compiler's estimated cycles (docs/performance.md).
GATHERED_UP_TO = {
    "cpu": (0.95, 0.95, 0.95, 0.95),
    "tpu": (0.65, 0.65, 0.95, 0.95),
    "gpu": (0.75, 0.65, 0.8, 0.8),
}


def stage_kinds(layout: str, platform: str, share: float) -> tuple[type[Masked] | type[Gathered], ...]:
    """Returns the layout class of each stage.

    Args:
      layout: a key of `LAYOUTS`, or `auto`.
      platform: where `auto` expects to run; platforms other than `cpu` and `tpu` use the `gpu` settings.
      share: share of patches that are visible.
    """
    if layout != AUTO:
        return LAYOUTS[layout]
    limits = GATHERED_UP_TO.get(platform, GATHERED_UP_TO["gpu"])
    return tuple(Gathered if share <= most else Masked for most in limits)


class Output(NamedTuple):
    """The result of a forward pass of FCMAE.

    Attributes:
      loss: `[B]` float32, each sample's mean squared error over its masked patches.
      prediction: `[B, H/s, W/s, s*s*C]` float32, the normalised pixels of every patch, s being the stride.
      masked: `[B, H/s, W/s]` bool, True where the patch was hidden from the encoder.
    """

    loss: Float[Array, " b"]
    prediction: Float[Array, "b h w p"]
    masked: Bool[Array, "b h w"]


def visible_count(patches: int, ratio: float) -> int:
    """Returns how many of `patches` stay visible: L * (1 - ratio), rounded down.

    The small term makes up for rounding errors. The official code lacks it and loses a patch where 1 - ratio
    is rounded down: at ratio 0.8 it leaves 4 of 25 patches visible and none of 5, where this leaves 5 and 1.
    At the paper's ratio 0.6, and at 0.5, 0.7 and 0.75, both leave the same number.
    """
    return int(patches * (1 - ratio) + 1e-6)


def random_mask(keys: Key[Array, " b"], grid: tuple[int, int], ratio: float) -> Bool[Array, "b rows columns"]:
    """Draws one mask `[B, rows, columns]` per key (True = hidden); all hide the same number of cells.

    Raises:
      UserError: the ratio leaves no cell visible, is negative, or is not below 1.
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

    The variance is unbiased (N - 1), with 1e-6 added inside the root, as in the official loss.
    """
    patches = widened(to_patches(images, patch))
    return patches, *_mean_and_deviation(patches)


def _mean_and_deviation(patches: Array) -> tuple[Array, Array]:
    deviation = jnp.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
    return patches.mean(axis=-1, keepdims=True), deviation


def paste(
    images: Float[Array, "b height width c"],
    prediction: Float[Array, "b h w p"],
    masked: Bool[Array, "b h w"],
) -> tuple[Float[Array, "b height width c"], Float[Array, "b height width c"]]:
    """Maps a prediction back to image space with the true mean and deviation of each patch.

    Returns:
      The images `[B, H, W, C]` reconstructed from every patch, and the given images with the reconstruction
      pasted into the masked patches.
    """
    patch = images.shape[1] // masked.shape[1]
    _, mean, deviation = patch_statistics(images, patch)
    reconstruction = from_patches(prediction * deviation + mean, patch)
    hidden = repeat(masked, "b h w -> b (h p) (w q) 1", p=patch, q=patch)
    return reconstruction, jnp.where(hidden, reconstruction, images)


class FCMAE(nnx.Module):
    """Fully convolutional masked autoencoder: a sparse encoder and a dense decoder of few blocks.

    Args:
      config: the encoder's options; the decoder shares `remat`, `scan` and `dtype`.
      mask_ratio: share of patches that are hidden.
      mask_patch: side of the hidden squares in pixels, a multiple of the total stride; 0 = the stride.
      decoder_dim: channels of the decoder.
      decoder_depth: blocks of the decoder.
      layout: how the encoder holds its masked map: a key of `LAYOUTS`, or `auto`.
      platform: where `auto` expects to run: `cpu`, `tpu` or `gpu` (other platforms use the `gpu` settings);
        by default JAX's default backend.
      rngs: the `params` stream initialises.

    Raises:
      UserError: `mask_patch` is not a multiple of the stride, or the layout is unknown.
    """

    encoder_prefix = "encoder."

    def __init__(
        self,
        config: EncoderConfig,
        *,
        mask_ratio: float = 0.6,
        mask_patch: int = 0,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        layout: str = AUTO,
        platform: str | None = None,
        rngs: nnx.Rngs,
    ):
        known = [*LAYOUTS, AUTO]
        if layout not in known:
            raise UserError(f"unknown layout '{layout}'{nearest(layout, known)} (known: {', '.join(known)})")
        self.encoder = Encoder(config, rngs=rngs)
        stride = self.encoder.stride
        if mask_patch < 0 or mask_patch % stride:
            raise UserError(f"mask_patch {mask_patch} is not a multiple of the stride {stride}")
        self.mask_patch = mask_patch or stride
        self.mask_ratio = mask_ratio
        self.layout = layout
        self.platform = platform or jax.default_backend()
        dtype = config.dtype
        self.proj = Linear(config.dims[-1], decoder_dim, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(normal_init()(rngs.params(), (decoder_dim,)))
        self.decoder = nnx.List([Block(decoder_dim, dtype=dtype, rngs=rngs) for _ in range(decoder_depth)])
        self.pred = Linear(decoder_dim, stride * stride * config.in_chans, dtype=dtype, rngs=rngs)

    def mask(self, keys: Key[Array, " b"], height: int, width: int) -> Bool[Array, "b rows columns"]:
        """Draws masks on the grid of the last stage (True = hidden), for images of this size.

        Raises:
          UserError: a side is not a multiple of `mask_patch`, or no patch would stay visible.
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
          masked: masks on the grid of the last stage (True = hidden).
          drawn: whether `mask` drew them, so that every sample hides the same number of whole squares of
            `mask_patch` pixels. Gathered stages have room for exactly the squares that stay visible;
            with other masks `auto` therefore holds every stage masked.

        Raises:
          UserError: masks that `mask` did not draw do not fit layout `gathered`. Masks that are traced, as
            arguments of a jitted function are, have no values to check: if they do not fit, the result is
            wrong.
        """
        cells = self.mask_patch // self.encoder.stride
        coarse = masked[:, ::cells, ::cells]
        visible = visible_count(coarse[0].size, self.mask_ratio)
        layout = "masked" if self.layout == AUTO and not drawn else self.layout
        kinds = stage_kinds(layout, self.platform, visible / coarse[0].size)
        if Gathered in kinds and not drawn and not isinstance(masked, jax.core.Tracer):
            self._check_fit(np.asarray(masked), visible)
        scales = [2 ** (STAGES - 1 - stage) for stage in range(STAGES)]
        return [
            Gathered.from_mask(coarse, visible, cells * scale)
            if kind is Gathered
            else Masked.from_mask(masked, scale)
            for kind, scale in zip(kinds, scales, strict=True)
        ]

    def _check_fit(self, masked: np.ndarray, visible: int) -> None:
        """Raises UserError unless every mask hides whole squares and leaves `visible` of them.

        In NumPy, because within a jitted function even an operation of JAX on constants has no value yet.
        """
        cells = self.mask_patch // self.encoder.stride
        coarse = masked[:, ::cells, ::cells]
        whole = (coarse.repeat(cells, axis=1).repeat(cells, axis=2) == masked).all()
        if not whole or ((~coarse).sum(axis=(1, 2)) != visible).any():
            raise UserError(
                f"layout 'gathered' takes masks that leave {visible} of {coarse[0].size} squares of "
                f"{self.mask_patch} pixels visible in every image; use layout 'masked' for others"
            )

    def __call__(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"],
        masked: Bool[Array, "b rows columns"] | None = None,
        *,
        train: bool = True,
    ) -> Output:
        """Masks, encodes, decodes and scores a batch, and predicts every patch.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample, for its mask and its stochastic depth.
          masked: masks on the grid of the last stage, used instead of drawn ones; see `layouts`.
          train: False switches stochastic depth off.

        Raises:
          UserError: see `mask`, `layouts` and `Encoder.features`.
        """
        drawn = masked is None
        if masked is None:
            masked = self.mask(keys, *images.shape[1:3])
        x = self._decoded(images, keys, masked, drawn=drawn, train=train)
        prediction = widened(self.pred(x))
        error = _error(prediction, *patch_statistics(images, self.encoder.stride))
        hidden = jnp.maximum(masked.sum(axis=(1, 2)), 1)
        loss = jnp.where(masked, error, 0).sum(axis=(1, 2)) / hidden
        return Output(loss, prediction, masked)

    def loss(
        self, images: Float[Array, "b height width c"], keys: Key[Array, " b"], *, train: bool = True
    ) -> Float[Array, " b"]:
        """Returns the loss of `__call__` with masks that it draws, but predicts only the masked patches.

        Args:
          images: normalised images `[B, H, W, in_chans]`.
          keys: one random key per sample, for its mask and its stochastic depth.
          train: False switches stochastic depth off.

        Raises:
          UserError: see `mask` and `Encoder.features`.
        """
        masked = self.mask(keys, *images.shape[1:3])
        cells = self.mask_patch // self.encoder.stride
        coarse = masked[:, ::cells, ::cells]
        count = coarse[0].size - visible_count(coarse[0].size, self.mask_ratio)
        if not count:
            return jnp.zeros(len(images), jnp.promote_types(images.dtype, jnp.float32))
        x = self._decoded(images, keys, masked, drawn=True, train=train)
        hidden = Gathered.from_mask(~coarse, count, cells)
        patches = widened(hidden.enter(images, self.encoder.stride))
        error = _error(widened(self.pred(hidden.enter(x, 1))), patches, *_mean_and_deviation(patches))
        return error.mean(axis=1)

    def _decoded(
        self,
        images: Float[Array, "b height width c"],
        keys: Key[Array, " b"],
        masked: Bool[Array, "b rows columns"],
        *,
        drawn: bool,
        train: bool,
    ) -> Float[Array, "b rows columns d"]:
        """Encodes what is visible, puts the mask token everywhere else, and decodes."""
        x = self.encoder.features(images, keys if train else None, self.layouts(masked, drawn=drawn))[-1]
        x = self.proj(x)
        x = jnp.where(masked[..., None], self.mask_token[...].astype(x.dtype), x)
        config = self.encoder.config
        return run_blocks(self.decoder, x, Dense(), remat=config.remat, scan=config.scan)


def _error(prediction: Array, patches: Array, mean: Array, deviation: Array) -> Array:
    """Returns the mean squared error of each patch's normalised pixels."""
    return jnp.square(prediction - (patches - mean) / deviation).mean(axis=-1)
