"""Runs a stack of equal blocks, unrolled or scanned, and chooses what the backward pass keeps."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.layouts import Layout

# What jax.checkpoint keeps inside a block: nothing, or the results of matrix products.
POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *POLICIES)


def check_remat(remat: str) -> None:
    """Raises UserError unless `remat` is one of `REMAT`."""
    if remat not in REMAT:
        raise UserError(f"unknown remat policy '{remat}'{nearest(remat, REMAT)} (known: {', '.join(REMAT)})")


def run_blocks(
    blocks: Sequence[Callable],
    x: Float[Array, "b *any c"],
    layout: Layout,
    factors: Float[Array, "blocks b"] | None = None,
    *,
    remat: str,
    scan: bool,
) -> Float[Array, "b *any c"]:
    """Runs equal blocks one after another.

    Args:
      blocks: modules of the same structure.
      x: the map, as `layout` holds it.
      layout: where its pixels are stored.
      factors: on each block's residual branch, per sample; None for ones.
      remat: what the backward pass recomputes: `none`, `dots` (everything but matrix products) or `block`
        (everything inside a block; only the maps between blocks are kept).
      scan: compiles one block and loops over the stacked parameters, so that compile time hardly grows with
        depth.
    """
    if not blocks:
        return x
    graph = nnx.graphdef(blocks[0])

    def step(x, inputs):
        state, factor = inputs
        return nnx.merge(graph, state)(x, layout, factor), None

    if remat != "none":
        # A loop already separates the forward from the backward pass.
        step = jax.checkpoint(step, policy=POLICIES[remat], prevent_cse=not scan)
    states = [nnx.state(block) for block in blocks]
    if scan and len(blocks) > 1:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jax.lax.scan(step, x, (stacked, factors))[0]
    for index, state in enumerate(states):
        x, _ = step(x, (state, None if factors is None else factors[index]))
    return x
