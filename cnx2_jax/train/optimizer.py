"""AdamW as the paper uses it: schedule, weight-decay mask, layer-wise learning rates, clipping."""

import math
import re
from collections.abc import Iterable

import optax
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.state import Params

BASE_BATCH = 256  # recipes give the learning rate for this batch; it grows linearly with the batch
_PLACE = re.compile(r"(encoder\.)?(downsample_layers\.(?P<down>\d)|stages\.(?P<stage>\d)\.(?P<block>\d+))\.")


def decay_mask(params: Params) -> dict[str, bool]:
    """Says of each parameter whether weight decay applies: to kernels only.

    Not to biases, norms, GRN's gamma and beta, nor the mask token; the official fine-tuning code has come
    to the same rule.
    """
    return {name: name.endswith("kernel") for name in params}


def trainable(params: Params, pattern: str) -> Params:
    """Returns the parameters in whose names the regular expression is found; the others stay as they are.

    Raises:
      UserError: it is none, or is found nowhere.
    """
    try:
        chosen = {name: leaf for name, leaf in params.items() if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"optimizer.trainable '{pattern}' is no regular expression: {error}") from None
    if not chosen:
        raise UserError(
            f"optimizer.trainable '{pattern}' is found in no parameter's name; they are such as "
            f"'{next(iter(params))}'"
        )
    return chosen


def layers(names: Iterable[str], kind: str) -> tuple[dict[str, int], int]:
    """Numbers the layers by which learning rates decay, from the stem's on.

    `single`: every block is a layer. `group`: blocks of stages 1 and 2 are one each, those of stage 3 in
    threes, stage 4 is the last (official `optim_factory.py`). What is behind the encoder comes after.

    Args:
      names: of the parameters.
      kind: `single` or `group`.

    Returns:
      Each name's layer, and the number of what comes after the last one.

    Raises:
      UserError: another kind, or a third stage that is too long for it.
    """
    known = ("single", "group")
    if kind not in known:
        raise UserError(
            f"unknown optimizer.layer_decay_type '{kind}'{nearest(kind, known)} (known: {', '.join(known)})"
        )
    places = {name: _PLACE.match(name) for name in names}
    depths = [0] * 4
    for match in places.values():
        if match and match["stage"]:
            depths[int(match["stage"])] = max(depths[int(match["stage"])], int(match["block"]) + 1)
    if kind == "group" and depths[2] > 27:
        raise UserError(
            f"optimizer.layer_decay_type=group takes at most 27 blocks in stage 3, "
            f"not {depths[2]}; use single"
        )
    last = sum(depths) if kind == "single" else 12

    def number(match: re.Match | None) -> int:
        if match is None:
            return last + 1
        down = match["down"] is not None
        stage, block = int(match["down"] or match["stage"]), int(match["block"] or 0)
        if kind == "single":
            return sum(depths[:stage]) + block + 1
        if down:
            return (0, 2, 3, 12)[stage]
        return (1, 2, 3 + block // 3, 12)[stage]

    return {name: number(match) for name, match in places.items()}, last + 1


def updates_made(opt_state: optax.OptState) -> int:
    """Returns how many updates an optimizer's state has seen; the schedule follows them."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return max(int(count) for _, count in counts)


def learning_rate_scales(names: Iterable[str], decay: float, kind: str) -> dict[str, float]:
    """Returns the factor on each parameter's learning rate: `decay` to the number of layers behind its own.

    Raises:
      UserError: see `layers`.
    """
    numbers, after = layers(names, kind)
    return {name: decay ** (after - number) for name, number in numbers.items()}


def learning_rate_schedule(
    optimizer: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns step -> learning rate: linear warmup from 0, then half a cosine down to the minimum.

    Both are set per step. The peak is `base_learning_rate * batch_size / 256`.

    Raises:
      UserError: the base learning rate is not positive, or infinite.
    """
    if not 0 < optimizer.base_learning_rate < math.inf:
        raise UserError(
            f"optimizer.base_learning_rate {optimizer.base_learning_rate} must be above 0 and finite"
        )
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


def make_optimizer(
    optimizer: ConfigDict, schedule: optax.Schedule, names: Iterable[str]
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled decay on kernels, for a dict of parameters by name.

    Gradients are clipped to `clip_norm` where that is not 0. `layer_decay` scales whole updates, weight
    decay's part included, as parameter groups of that learning rate have it in PyTorch.

    Args:
      optimizer: the config's keys.
      schedule: gives the learning rate.
      names: of all parameters of the model, those that do not train included.

    Raises:
      UserError: see `layers`.
    """
    parts = []
    if optimizer.clip_norm:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    parts.append(adamw)
    scales = learning_rate_scales(names, optimizer.layer_decay, optimizer.layer_decay_type)
    if optimizer.layer_decay != 1:
        parts.append(
            optax.stateless(lambda updates, _: {name: u * scales[name] for name, u in updates.items()})
        )
    return optax.chain(*parts) if len(parts) > 1 else adamw
