"""The five losses, each as a sum over boxes and the weight to divide it by over the global batch.

The means are mmdetection's, except for an image without a positive or negative box, for which it counts one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cnx2_jax.models.mask_rcnn.heads import BoxOutputs
from cnx2_jax.models.mask_rcnn.rpn import RPNOutputs
from cnx2_jax.models.mask_rcnn.targets import RoITargets, RPNTargets

# By name, (sum, weight): the arguments of a `Term`.
Losses = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


def rpn_losses(outputs: RPNOutputs, targets: RPNTargets) -> Losses:
    """Returns sigmoid cross-entropy and L1 of the drawn anchors; both are averaged over all of them.

    Args:
      outputs: for all anchors, the levels concatenated.
      targets: `[B, samples]`.
    """
    logits = jnp.take_along_axis(outputs.logits, targets.indices, axis=1)
    deltas = jnp.take_along_axis(outputs.deltas, targets.indices[..., None], axis=1)
    weight = targets.valid.sum().astype(logits.dtype)
    cross_entropy = binary_cross_entropy(logits, targets.positive.astype(logits.dtype))
    distance = jnp.abs(deltas - targets.deltas).sum(axis=-1)
    return {
        "rpn_class_loss": (jnp.where(targets.valid, cross_entropy, 0).sum(), weight),
        "rpn_box_loss": (jnp.where(targets.positive, distance, 0).sum(), weight),
    }


def box_losses(outputs: BoxOutputs, targets: RoITargets) -> Losses:
    """Returns softmax cross-entropy and L1 of the drawn regions; both are averaged over all of them."""
    likelihoods = jax.nn.log_softmax(outputs.logits, axis=-1)
    chosen = jnp.take_along_axis(likelihoods, targets.classes[..., None], axis=-1)[..., 0]
    # The background has no deltas; its class is brought into range, and its distance is left out below.
    classes = jnp.minimum(targets.classes, outputs.deltas.shape[2] - 1)
    deltas = jnp.take_along_axis(outputs.deltas, classes[..., None, None], axis=2)[:, :, 0]
    weight = targets.valid.sum().astype(chosen.dtype)
    distance = jnp.abs(deltas - targets.deltas).sum(axis=-1)
    return {
        "class_loss": (-jnp.where(targets.valid, chosen, 0).sum(), weight),
        "box_loss": (jnp.where(targets.positive, distance, 0).sum(), weight),
    }


def mask_losses(
    logits: Float[Array, "b r side side"], masks: Float[Array, "b r side side"], positive: Bool[Array, "b r"]
) -> Losses:
    """Returns sigmoid cross-entropy, averaged over the pixels of positive regions.

    Args:
      logits: of each region's class.
      masks: 0 or 1.
      positive: bool `[B, R]`.
    """
    cross_entropy = binary_cross_entropy(logits, masks.astype(logits.dtype)).sum(axis=(2, 3))
    weight = positive.sum().astype(logits.dtype) * (masks.shape[2] * masks.shape[3])
    return {"mask_loss": (jnp.where(positive, cross_entropy, 0).sum(), weight)}


def binary_cross_entropy(logits: Float[Array, "*n"], target: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the cross-entropy of a sigmoid, without overflow."""
    return jax.nn.softplus(logits) - logits * target
