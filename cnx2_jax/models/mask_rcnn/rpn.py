"""The region proposal network (arXiv 1506.01497): its head, and the proposals made of what it returns."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cnx2_jax.models.mask_rcnn.anchors import RATIOS
from cnx2_jax.models.mask_rcnn.boxes import RPN_STDS, decode
from cnx2_jax.models.mask_rcnn.layers import Conv
from cnx2_jax.models.mask_rcnn.nms import nms

LARGEST_OVERLAP = 0.7  # of two proposals of one level


class RPNOutputs(NamedTuple):
    """What the head returns for the n anchors of a level, in their order; both float32 or wider.

    Attributes:
      logits: whether an anchor has an object, `[B, n]`.
      deltas: from the anchor to the object's box, `[B, n, 4]`; see boxes.py.
    """

    logits: Float[Array, "b n"]
    deltas: Float[Array, "b n 4"]


class RPNHead(nnx.Module):
    """A 3x3 convolution, and 1x1 convolutions to a logit and four deltas per anchor; shared by all levels."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        initial = nnx.initializers.normal(0.01)
        wide = jnp.promote_types(dtype, jnp.float32)
        self.rpn_conv = Conv(3, channels, channels, initial, dtype=dtype, rngs=rngs)
        self.rpn_cls = Conv(1, channels, len(RATIOS), initial, dtype=wide, rngs=rngs)
        self.rpn_reg = Conv(1, channels, 4 * len(RATIOS), initial, dtype=wide, rngs=rngs)

    def __call__(self, level: Float[Array, "b h w c"]) -> RPNOutputs:
        x = nnx.relu(self.rpn_conv(level))
        batch = x.shape[0]
        return RPNOutputs(self.rpn_cls(x).reshape(batch, -1), self.rpn_reg(x).reshape(batch, -1, 4))


class Proposals(NamedTuple):
    """Boxes that may hold an object, by falling score.

    Attributes:
      boxes: `[B, count, 4]` in pixels; 0 where there is none.
      valid: whether there is one.
    """

    boxes: Float[Array, "b count 4"]
    valid: Bool[Array, "b count"]


def propose(
    outputs: Sequence[RPNOutputs],
    anchors: Sequence[Float[Array, "_n 4"]],
    valid: Sequence[Bool[Array, "b _n"]],
    sizes: Int[Array, "b 2"],
    *,
    before: int,
    after: int,
) -> Proposals:
    """Returns the best `after` boxes of all levels that suppression within each level leaves.

    Boxes are clipped to the image; those without area are dropped. No gradient flows through them.

    Args:
      outputs: of each level.
      anchors: of each level.
      valid: which of them exist in each image.
      sizes: height and width of each image in pixels, without padding.
      before: boxes of a level that take part in its suppression: those of the largest logits.
      after: boxes of the result.
    """
    outputs = jax.lax.stop_gradient(list(outputs))
    of_level = jax.vmap(functools.partial(_of_level, before=before), in_axes=(0, None, 0, 0))
    found = [of_level(*level, sizes) for level in zip(outputs, anchors, valid, strict=True)]
    scores = jnp.concatenate([scores for scores, _ in found], axis=1)
    boxes = jnp.concatenate([boxes for _, boxes in found], axis=1)
    missing = max(0, after - scores.shape[1])
    scores = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    boxes = jnp.pad(boxes, ((0, 0), (0, missing), (0, 0)))
    best, index = jax.lax.top_k(scores, after)
    exists = best > -jnp.inf
    boxes = jnp.take_along_axis(boxes, index[..., None], axis=1)
    return Proposals(jnp.where(exists[..., None], boxes, 0), exists)


def _of_level(
    outputs: RPNOutputs,
    anchors: Float[Array, "n 4"],
    valid: Bool[Array, " n"],
    size: Int[Array, "2"],
    before: int,
) -> tuple[Float[Array, " k"], Float[Array, "k 4"]]:
    """Returns the logits and boxes of one image's level; -inf for those that are suppressed."""
    logits, index = jax.lax.top_k(jnp.where(valid, outputs.logits, -jnp.inf), min(before, len(anchors)))
    boxes = decode(anchors[index], outputs.deltas[index], RPN_STDS, size)
    exists = (logits > -jnp.inf) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept = nms(boxes, logits, exists, LARGEST_OVERLAP)
    return jnp.where(kept, logits, -jnp.inf), boxes
