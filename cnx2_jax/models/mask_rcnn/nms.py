"""Non-maximum suppression with static shapes: hard, and soft with linear decay (arXiv 1704.04503)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cnx2_jax.models.mask_rcnn.boxes import iou

DECAY_OVERLAP = 0.5  # from which on soft suppression lowers a score
LOWEST_SCORE = 0.001  # after it; mmdetection's min_score


def nms(
    boxes: Float[Array, "n 4"], scores: Float[Array, " n"], valid: Bool[Array, " n"], threshold: float
) -> Bool[Array, " n"]:
    """Returns which boxes greedy suppression keeps: those that no better kept box overlaps too much.

    Of equal scores, the first is better. The result is the fixed point of `keep = ~(a kept box suppresses)`.
    Iteration reaches it after as many rounds as the longest chain of suppressions has, usually 3 to 6.

    Args:
      boxes: of one class or level.
      scores: their scores.
      valid: which of them exist.
      threshold: the largest overlap (intersection over union) that does not suppress.
    """
    order = jnp.arange(len(boxes))
    better = scores[:, None] > scores
    better |= (scores[:, None] == scores) & (order[:, None] < order)
    suppresses = (iou(boxes, boxes) > threshold) & better

    def refine(state: tuple[Array, Array]) -> tuple[Array, Array]:
        keep, _ = state
        refined = valid & ~(suppresses & keep[:, None]).any(axis=0)
        return refined, (refined != keep).any()

    return jax.lax.while_loop(lambda state: state[1], refine, (valid, jnp.array(True)))[0]


class Kept(NamedTuple):
    """What soft suppression keeps, by falling score; empty places come last.

    Attributes:
      classes: of each kept box.
      indices: which box of its class it is.
      scores: after decay; 0 in empty places.
    """

    classes: Int[Array, " count"]
    indices: Int[Array, " count"]
    scores: Float[Array, " count"]


def soft_nms(
    boxes: Float[Array, "k n 4"],
    scores: Float[Array, "k n"],
    count: int,
    *,
    threshold: float = DECAY_OVERLAP,
    lowest: float = LOWEST_SCORE,
) -> Kept:
    """Takes the best box `count` times, and each time lowers the scores that overlap it in its class.

    A score is multiplied by 1 - overlap where the overlap is at least `threshold`, as in mmcv. Classes do not
    see each other, so no box has to be left out before: a round costs one class's overlaps with one box.

    Args:
      boxes: `[classes, boxes, 4]`.
      scores: at least 0; 0 takes no part.
      count: places of the result.
      threshold: see above.
      lowest: a lowered score below this takes no part any more.
    """

    def take(scores: Array, _: None) -> tuple[Array, tuple[Array, Array, Array]]:
        place = scores.argmax()
        chosen, index = place // scores.shape[1], place % scores.shape[1]
        row, row_boxes = scores[chosen], boxes[chosen]
        overlaps = iou(row_boxes[index][None], row_boxes)[0]
        lowered = row * jnp.where(overlaps >= threshold, 1 - overlaps, 1)
        lowered = jnp.where(lowered < lowest, 0, lowered).at[index].set(0)
        return scores.at[chosen].set(lowered), (chosen, index, row[index])

    return Kept(*jax.lax.scan(take, scores, length=count)[1])
