"""AdamW as the paper uses it: schedule, weight-decay mask, clipping."""

import optax
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.train.state import Params

BASE_BATCH = 256  # recipes give the learning rate for this batch; it grows linearly with the batch


def decay_mask(params: Params) -> dict[str, bool]:
    """Says of each parameter whether weight decay applies: to kernels only.

    Not to biases, norms, GRN's gamma and beta, nor the mask token; the official fine-tuning code has come
    to the same rule.
    """
    return {name: name.endswith("kernel") for name in params}


def learning_rate_schedule(
    optimizer: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns step -> learning rate: linear warmup from 0, then half a cosine down to the minimum.

    Both are set per step. The peak is `base_learning_rate * batch_size / 256`.

    Raises:
      UserError: the base learning rate is not positive.
    """
    if not optimizer.base_learning_rate > 0:
        raise UserError(f"optimizer.base_learning_rate {optimizer.base_learning_rate} must be above 0")
    peak = optimizer.base_learning_rate * batch_size / BASE_BATCH
    warmup_steps = min(warmup_steps, total_steps)
    cosine_steps = max(total_steps - warmup_steps, 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
            optax.cosine_decay_schedule(peak, cosine_steps, alpha=optimizer.min_learning_rate / peak),
        ],
        [warmup_steps],
    )


def make_optimizer(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW with decoupled decay on kernels, clipped to `clip_norm` where that is not 0."""
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    if not optimizer.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
