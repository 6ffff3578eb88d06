"""Where a block's pixels live.

A ConvNeXt V2 block needs three things of the map it works on: a neighbourhood for the depthwise
convolution, a sum over positions for GRN, and non-overlapping patches for down-sampling. A layout
supplies these, so one Block with one set of parameters serves the plain network and the sparse one.

A layout is an immutable value that belongs to one resolution; `coarser` gives the one a down-sampling
step later.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float

from cnx2_jax.kernels.depthwise import depthwise_conv


@runtime_checkable  # the tests check annotations, this one too
class Layout(Protocol):
    """What the blocks, the stem and the down-sampling layers ask of a map."""

    def enter(self, images: Array, patch: int) -> Array:
        """Cuts images `[B, H, W, C]` into patches `[..., patch * patch * C]` for the stem."""
        ...

    def leave(self, x: Array) -> Array:
        """Returns the plain map `[B, h, w, C]`, zero where nothing is visible."""
        ...

    def depthwise(self, x: Array, kernel: Array) -> Array:
        """Convolves each channel with its `[KH, KW, C]` kernel over visible neighbours only."""
        ...

    def sum_positions(self, x: Array) -> Array:
        """Sums over the visible positions of each sample; the summed axes stay, with size 1."""
        ...

    def patches(self, x: Array) -> Array:
        """Cuts the map into 2x2 patches, for down-sampling: last axis (row, column, channel)."""
        ...

    def coarser(self) -> "Layout":
        """Returns the layout of the map that `patches` gives."""
        ...


def to_patches(x: Float[Array, "b height width c"], patch: int) -> Float[Array, "b rows columns vector"]:
    """Cuts `[B, H, W, C]` into `[B, H/p, W/p, p*p*C]`, each vector ordered row, column, channel."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def from_patches(
    patches: Float[Array, "b rows columns vector"], patch: int
) -> Float[Array, "b height width c"]:
    """Inverse of `to_patches`."""
    return rearrange(patches, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """The plain map `[B, H, W, C]`: every position is visible."""

    def enter(self, images: Array, patch: int) -> Array:
        return to_patches(images, patch)

    def leave(self, x: Array) -> Array:
        return x

    def depthwise(self, x: Array, kernel: Array) -> Array:
        return depthwise_conv(x, kernel)

    def sum_positions(self, x: Array) -> Array:
        return x.sum(axis=(1, 2), keepdims=True)

    def patches(self, x: Array) -> Array:
        return to_patches(x, 2)

    def coarser(self) -> "Dense":
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """The plain map with masked positions held at zero wherever positions meet.

    Sparse convolution emulated by masking before and after every depthwise convolution, and in every
    sum over positions (paper, section 3.1). Between those, masked positions carry values that nothing
    visible depends on. `where` rather than a product, so that not even a NaN leaks out of them.
    """

    visible: Bool[Array, "b h w"]

    @classmethod
    def from_mask(cls, masked: Bool[Array, "b rows columns"], scale: int) -> "Masked":
        """Returns the layout of a map `scale` times as fine as the mask (True = hidden)."""
        return cls(repeat(~masked, "b h w -> b (h p) (w q)", p=scale, q=scale))

    def _held(self, x: Array) -> Array:
        return jnp.where(self.visible[..., None], x, jnp.zeros((), x.dtype))

    def enter(self, images: Array, patch: int) -> Array:
        return self._held(to_patches(images, patch))

    def leave(self, x: Array) -> Array:
        return self._held(x)

    def depthwise(self, x: Array, kernel: Array) -> Array:
        return self._held(depthwise_conv(self._held(x), kernel))

    def sum_positions(self, x: Array) -> Array:
        return self._held(x).sum(axis=(1, 2), keepdims=True)

    def patches(self, x: Array) -> Array:
        return to_patches(x, 2)

    def coarser(self) -> "Masked":
        # Masks are drawn on a grid at least as coarse as the last stage, so a 2x2 patch is visible or
        # hidden as a whole.
        return Masked(self.visible[:, ::2, ::2])
