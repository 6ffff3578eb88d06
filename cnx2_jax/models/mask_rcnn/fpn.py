"""The feature pyramid (arXiv 1612.03144), as mmdetection's FPN: five levels, no norms and no activations."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cnx2_jax.models.mask_rcnn.layers import ConvModule, xavier


class FPN(nnx.Module):
    """Levels of equal width from the four stage maps, each with what the coarser ones see.

    Args:
      dims: channels of the stage maps.
      channels: of the levels.
      dtype: compute dtype.
      rngs: the `params` stream initialises.
    """

    def __init__(self, dims: tuple[int, ...], channels: int, *, dtype, rngs: nnx.Rngs):
        self.lateral_convs = nnx.List(
            [ConvModule(1, dim, channels, xavier, dtype=dtype, rngs=rngs) for dim in dims]
        )
        self.fpn_convs = nnx.List(
            [ConvModule(3, channels, channels, xavier, dtype=dtype, rngs=rngs) for _ in dims]
        )

    def __call__(
        self, maps: Sequence[Float[Array, "b _h _w _c"]], visible: Sequence[Bool[Array, "b _h _w"]]
    ) -> list[Float[Array, "b _h _w channels"]]:
        """Returns five levels: one of each map's size, and every second position of the last one.

        Args:
          maps: from fine to coarse, each half the size of the one before.
          visible: positions of each map that exist. Others are 0 wherever positions interact, and in the
            result.
        """
        laterals = [
            _held(lateral(x), mask)
            for lateral, x, mask in zip(self.lateral_convs, maps, visible, strict=True)
        ]
        merged = [laterals[-1]]  # from coarse to fine
        for lateral in laterals[-2::-1]:
            merged.append(lateral + merged[-1].repeat(2, axis=1).repeat(2, axis=2))
        levels = [
            _held(module(x), mask)
            for module, x, mask in zip(self.fpn_convs, reversed(merged), visible, strict=True)
        ]
        return [*levels, levels[-1][:, ::2, ::2]]


def _held(x: Array, visible: Array) -> Array:
    """Sets positions that do not exist to 0."""
    return jnp.where(visible[..., None], x, jnp.zeros((), x.dtype))
