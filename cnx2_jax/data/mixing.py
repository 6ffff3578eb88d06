"""Mixup and cutmix, on the accelerator, where the images of all hosts form one batch.

One draw serves the whole batch, and image i is mixed with image B - 1 - i, as in the batch mode of
timm.data.mixup.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SWITCH = 0.5  # the share of batches that are cut if both kinds are on


class Mix(NamedTuple):
    """How a batch is mixed.

    Attributes:
      keep: float32 [H, W, 1]: the weight of each pixel; its partner's pixel has the rest.
      share: float32 scalar: the weight of an image's own label.
    """

    keep: Float[Array, "height width 1"]
    share: Float[Array, ""]


def draw_mix(key: jax.Array, size: tuple[int, int], mixup: float, cutmix: float) -> Mix:
    """Draws the mix of one batch: mixup, cutmix or, if both alphas are above 0, either with equal chance.

    Args:
      key: of the batch.
      size: height and width of the images.
      mixup: alpha of the beta distribution of mixup's coefficient; 0 turns mixup off.
      cutmix: the same for cutmix.
    """
    choice_key, share_key, row_key, column_key = jax.random.split(key, 4)
    chance = _SWITCH if mixup and cutmix else float(cutmix > 0)
    cut = jax.random.uniform(choice_key) < chance
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha) if mixup or cutmix else jnp.float32(1)
    row = jax.random.randint(row_key, (), 0, size[0])
    column = jax.random.randint(column_key, (), 0, size[1])
    cut_mix = cutmix_at(share, row, column, size)
    mixed = Mix(jnp.full((*size, 1), share), share)
    return jax.tree.map(lambda a, b: jnp.where(cut, a, b), cut_mix, mixed)


def cutmix_at(share: Float[Array, ""], row: jax.Array, column: jax.Array, size: tuple[int, int]) -> Mix:
    """Cuts a box of `1 - share` of the area around (row, column), clipped to the image.

    The share of the label is that of the pixels that remain (timm's `correct_lam`).
    """
    ratio = jnp.sqrt(1 - share)
    inside = jnp.ones((1, 1), bool)
    for axis, centre in enumerate((row, column)):
        half = (size[axis] * ratio).astype(jnp.int32) // 2
        places = jnp.arange(size[axis])
        within = (places >= centre - half) & (places < centre + half)
        inside = inside & jnp.expand_dims(within, 1 - axis)
    keep = jnp.where(inside, 0.0, 1.0)
    return Mix(keep[..., None], keep.mean())


def mix_images(images: Float[Array, "b height width c"], mix: Mix) -> Float[Array, "b height width c"]:
    """Mixes each image with its partner."""
    return images * mix.keep + images[::-1] * (1 - mix.keep)


def mix_targets(
    labels: Int[Array, " b"], num_classes: int, mix: Mix, smoothing: float
) -> Float[Array, "b classes"]:
    """Returns the targets of mixed images: both labels weighted by their shares, smoothed."""
    return mix_rows(jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes, mix)


def mix_rows(targets: Float[Array, "b classes"], mix: Mix) -> Float[Array, "b classes"]:
    """Returns each image's targets and its partner's, weighted by their shares."""
    return targets * mix.share + targets[::-1] * (1 - mix.share)
