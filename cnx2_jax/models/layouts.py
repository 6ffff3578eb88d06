"""Layouts: which positions of a map are stored, and in what order.

A ConvNeXt V2 block needs three things of the map it works on: a neighbourhood for the depthwise
convolution, the positions that GRN sums over, and non-overlapping patches for down-sampling. A layout
supplies these, so one Block with one set of parameters serves the plain network and the sparse one.

A layout is an immutable value for one resolution. Stages may use different kinds; `patches_between` converts
a map from one to the next.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from cnx2_jax.kernels.depthwise import depthwise_conv, same_pads
from cnx2_jax.kernels.rows import Windows, depthwise_conv_windows, move

# Cells with at least so many positions per side are convolved one by one, smaller ones as a whole map. A
# border of 3 turns 8x8 into 14x14, 4x4 into 10x10 and 2x2 into 8x8; with 40% of the cells visible that is
# 1.2, 2.5 and 6.4 times the plain map.
MIN_WINDOW = 4


@runtime_checkable  # for the tests, which check annotations at run time
class Layout(Protocol):
    """The operations that blocks, stem and down-sampling layers need of a map."""

    def enter(self, images: Array, patch: int) -> Array:
        """Cuts a plain map `[B, H, W, C]` into the patches `[..., patch * patch * C]` of this layout."""
        ...

    def leave(self, x: Array) -> Array:
        """Returns the plain map `[B, h, w, C]`, zero where nothing is visible."""
        ...

    def depthwise(self, x: Array, kernel: Array) -> Array:
        """Convolves each channel with its `[KH, KW, C]` kernel over visible neighbours only."""
        ...

    def rows(self) -> Array | None:
        """Returns a bool mask of the visible positions, `[B, N, 1]` in the map's order; None if all are."""
        ...

    def patches(self, x: Array) -> Array:
        """Cuts the map into 2x2 patches, in the order of the same layout at half the resolution."""
        ...


def to_patches(x: Float[Array, "b height width c"], patch: int) -> Float[Array, "b rows columns vector"]:
    """Cuts `[B, H, W, C]` into `[B, H/p, W/p, p*p*C]`, each vector ordered row, column, channel."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def from_patches(
    patches: Float[Array, "b rows columns vector"], patch: int
) -> Float[Array, "b height width c"]:
    """Inverse of `to_patches`."""
    return rearrange(patches, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)


def patches_between(x: Array, before: Layout, after: Layout) -> Array:
    """Cuts a map of the layout `before` into 2x2 patches of the layout `after`, one resolution coarser."""
    if type(before) is type(after):
        return before.patches(x)
    return after.enter(before.leave(x), 2)


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

    def rows(self) -> None:
        return None

    def patches(self, x: Array) -> Array:
        return to_patches(x, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """The plain map, with masked positions set to zero wherever positions interact.

    This emulates sparse convolution: it masks before and after every depthwise convolution, and in every sum
    over positions (paper, section 3.1). In between, masked positions hold values that nothing visible depends
    on. It selects rather than multiplies, so that a NaN at a masked position does not spread.
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

    def rows(self) -> Array:
        return rearrange(self.visible, "b h w -> b (h w) 1")

    def patches(self, x: Array) -> Array:
        # A cell of the mask is at least 2x2 positions here, so a patch is visible or hidden as a whole.
        return to_patches(x, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """Only the visible positions, `[B, V * scale * scale, C]`: cell by cell, each row by row.

    Every mask of a batch leaves the same number V of cells visible, so shapes are static.
    """

    cells: Int[Array, "b v"]  # the grid index of each visible cell
    ranks: Int[Array, "b cells"]  # inverse of `cells`: the index among visible cells, or v if hidden
    index: Int[Array, "b n"]  # the position of the plain map of each row
    inverse: Int[Array, "b positions"]  # inverse of `index`: the row of each position, or n if hidden
    grid: tuple[int, int] = dataclasses.field(metadata={"static": True})  # cells
    scale: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_mask(cls, masked: Bool[Array, "b rows columns"], visible: int, scale: int) -> "Gathered":
        """Returns the layout of a map with `scale` x `scale` positions per cell of the mask (True = hidden).

        Args:
          masked: `[B, rows, columns]`, with the same number of visible cells in every sample.
          visible: that number.
          scale: positions per cell along one side.
        """
        rows, columns = masked.shape[1:]
        hidden = rearrange(masked, "b h w -> b (h w)")
        cells = jnp.argsort(hidden, axis=1, stable=True)[:, :visible]
        ranks = jnp.where(hidden, visible, jnp.cumsum(~hidden, axis=1) - 1)
        inside = jnp.arange(scale)
        row = cells[..., None, None] // columns * scale + inside[:, None]
        column = cells[..., None, None] % columns * scale + inside
        index = rearrange(row * (columns * scale) + column, "b v h w -> b (v h w)")
        first = rearrange(ranks, "b (h w) -> b h 1 w 1", h=rows) * scale**2
        inverse = rearrange(first + inside[:, None, None] * scale + inside, "b h p w q -> b (h p w q)")
        return cls(cells, ranks, index, jnp.minimum(inverse, index.shape[1]), (rows, columns), scale)

    def enter(self, images: Array, patch: int) -> Array:
        cells = rearrange(to_patches(images, self.scale * patch), "b h w f -> b (h w) f")
        side = {"h": self.scale, "w": self.scale, "p": patch, "q": patch}
        return rearrange(move(cells, self.cells, self.ranks), "b v (h p w q c) -> b (v h w) (p q c)", **side)

    def leave(self, x: Array) -> Array:
        return rearrange(move(x, self.inverse, self.index), "b (y x) c -> b y x c", x=self._width)

    @property
    def _width(self) -> int:
        return self.grid[1] * self.scale

    def depthwise(self, x: Array, kernel: Array) -> Array:
        size = kernel.shape[0], kernel.shape[1]
        return depthwise_conv_windows(x, kernel, self._windows(size))

    def _windows(self, kernel: tuple[int, int]) -> Windows:
        """Returns a window per visible cell, or one over the whole map where the borders would exceed it."""
        plain = rearrange(self.inverse, "b (y x) -> b y x", x=self._width)
        plain = jnp.pad(plain, ((0, 0), *same_pads(kernel)), constant_values=self.index.shape[1])
        if self.scale < MIN_WINDOW:
            shape = self.grid[0] * self.scale, self._width
            return Windows(rearrange(plain, "b y x -> b (y x)"), self.inverse, self.index, shape, kernel)
        y = (self.cells // self.grid[1] * self.scale)[..., None, None]
        x = (self.cells % self.grid[1] * self.scale)[..., None, None]
        y += jnp.arange(self.scale + kernel[0] - 1)[:, None]
        x += jnp.arange(self.scale + kernel[1] - 1)
        around = jax.vmap(lambda plain, y, x: plain[y, x])(plain, y, x)
        return Windows(
            rearrange(around, "b v y x -> b (v y x)"), None, None, (self.scale, self.scale), kernel
        )

    def rows(self) -> None:
        return None

    def patches(self, x: Array) -> Array:
        half = self.scale // 2
        return rearrange(x, "b (v h p w q) c -> b (v h w) (p q c)", h=half, w=half, p=2, q=2)
