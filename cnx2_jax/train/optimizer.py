"""AdamW as the paper uses it: schedule, weight-decay mask, layer-wise learning rates, clipping."""

import functools
import math
import re
from collections.abc import Iterable

import optax
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.state import Params

BASE_BATCH = 256  # recipes give the learning rate for this batch size; it grows linearly with the batch size
LAYER_KINDS = ("single", "group", "layer_wise", "stage")
SCHEDULES = ("cosine", "poly", "step")
DROPS = (3 / 4, 11 / 12)  # shares of the run after which `step` divides the rate by 10
STEP_WARMUP = 0.001  # share of the peak at which the warm-up of `step` begins
_LAYER = re.compile(r"(downsample_layers\.(?P<down>\d)|stages\.(?P<stage>\d)\.(?P<block>\d+))\.")


def decay_mask(params: Params, decay_grn: bool = False) -> dict[str, bool]:
    """Returns for each parameter whether weight decay applies to it: by default to kernels only.

    That excludes biases, norms, GRN's gamma and beta, and the mask token. The official code has two rules:
    - Fine-tuning (`optim_factory.py`, `get_parameter_groups`) excludes one-dimensional tensors and names
      ending in `.bias`, `.gamma` or `.beta`: the rule here.
    - Pretraining (`main_pretrain.py` with timm 0.3.2's `add_weight_decay`) excludes one-dimensional tensors
      and `.bias` only. Its GRN parameters are stored as [1, C] and its mask token as [1, C, 1, 1], so these
      decay. `decay_grn=True` does the same. In the authors' JAX code (TRAINING.md), which trained the
      paper's models, GRN's parameters are one-dimensional, so the same rule would exclude them.

    Args:
      params: by dotted name.
      decay_grn: whether GRN's gamma and beta and the mask token decay as well.
    """
    endings = ("kernel", "gamma", "beta", "mask_token") if decay_grn else ("kernel",)
    return {name: name.endswith(endings) for name in params}


def trainable(params: Params, pattern: str) -> Params:
    """Returns the parameters whose names contain a match of the regular expression; the others are frozen.

    Raises:
      UserError: the expression is invalid, or matches no name.
    """
    try:
        chosen = {name: leaf for name, leaf in params.items() if re.search(pattern, name)}
    except re.error as error:
        raise UserError(
            f"optimizer.trainable '{pattern}' is not a valid regular expression: {error}"
        ) from None
    if not chosen:
        raise UserError(
            f"optimizer.trainable '{pattern}' is found in no parameter's name; they are such as "
            f"'{next(iter(params))}'"
        )
    return chosen


def layers(names: Iterable[str], kind: str, encoder_prefix: str) -> tuple[dict[str, int], int]:
    """Numbers the layers for layer-wise learning rates, from the stem upwards.

    `single`: every block is a layer. `group`: the first two stages are one layer each, the blocks of the
    third are grouped in threes, the fourth is the last layer, number 12 (official `optim_factory.py`).
    `layer_wise`: the same, but the last layer is number 6 with up to 9 blocks in the third stage
    (`get_num_layer_layer_wise` and `num_layers` of ConvNeXt's configs for Mask R-CNN). `stage`: the stem
    and all down-sampling are layer 0, stage i is layer i + 1, and of layers there are 6, or 12 with more than
    9 blocks in the third stage; so the fourth stage is several layers below the last (`num_layers` of
    ConvNeXt's configs for UperNet, and `get_num_layer_stage_wise` there). Everything outside the encoder,
    such as norm, head or decoder, gets the number after the last layer.

    Args:
      names: dotted names of the parameters.
      kind: one of LAYER_KINDS.
      encoder_prefix: what precedes the encoder's names, as the model's class declares it: `""` for a
        classifier, `encoder.` for an FCMAE.

    Returns:
      Each name's layer, and the number of everything outside the encoder.

    Raises:
      UserError: the kind is unknown, or `group` or `layer_wise` meets more than 27 blocks in the third stage.
      ValueError: there is no stem or no block under the prefix.
    """
    _check_kind(kind)
    names = list(names)
    places = {
        name: _LAYER.match(name.removeprefix(encoder_prefix)) if name.startswith(encoder_prefix) else None
        for name in names
    }
    depths = [0] * 4
    has_stem = False
    for match in places.values():
        if match and match["stage"]:
            depths[int(match["stage"])] = max(depths[int(match["stage"])], int(match["block"]) + 1)
        has_stem |= bool(match and match["down"] == "0")
    if not has_stem or not any(depths):
        raise ValueError(
            f"the model declares its encoder under '{encoder_prefix}', but has no "
            f"'{encoder_prefix}downsample_layers.0.' or no '{encoder_prefix}stages.' there; its first "
            f"parameter is '{min(names, default='')}'. Correct encoder_prefix of its class"
        )
    if kind in ("group", "layer_wise") and depths[2] > 27:
        raise UserError(
            f"optimizer.layer_decay_type={kind} takes at most 27 blocks in stage 3, "
            f"not {depths[2]}; use single"
        )
    short = kind in ("layer_wise", "stage") and depths[2] <= 9
    last = sum(depths) if kind == "single" else 6 if short else 12

    def number(match: re.Match | None) -> int:
        if match is None:
            return last + 1
        down = match["down"] is not None
        stage, block = int(match["down"] or match["stage"]), int(match["block"] or 0)
        if kind == "single":
            return sum(depths[:stage]) + block + 1
        if kind == "stage":
            return 0 if down else stage + 1
        if down:
            return (0, 2, 3, last)[stage]
        return (1, 2, 3 + block // 3, last)[stage]

    return {name: number(match) for name, match in places.items()}, last + 1


def _check_kind(kind: str) -> None:
    if kind not in LAYER_KINDS:
        raise UserError(
            f"unknown optimizer.layer_decay_type '{kind}'{nearest(kind, LAYER_KINDS)} "
            f"(known: {', '.join(LAYER_KINDS)})"
        )


def updates_made(opt_state: optax.OptState) -> int:
    """Returns the number of updates that an optimizer's state has counted; the schedule depends on it."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return max(int(count) for _, count in counts)


def learning_rate_scales(
    names: Iterable[str], decay: float, kind: str, encoder_prefix: str
) -> dict[str, float]:
    """Returns the factor on each parameter's learning rate: `decay` to the number of layers above its own.

    Raises:
      UserError, ValueError: see `layers`.
    """
    numbers, after = layers(names, kind, encoder_prefix)
    return {name: decay ** (after - number) for name, number in numbers.items()}


def learning_rate_schedule(
    optimizer: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up from 0, then `optimizer.schedule` down to the minimum.

    `cosine`: half a cosine over the steps after the warm-up. `poly`: linear in the step over the whole run,
    the warm-up included, during which it is multiplied by the warm-up's share (mmcv's `poly` with power 1).
    Both change at every step. `step`: a tenth of the peak after 3/4 of the run, a hundredth after 11/12, as
    after epochs 27 and 33 of 36; the warm-up begins at a thousandth of the peak and ends in its last step
    (mmengine's `LinearLR`). There is no minimum. The peak is `base_learning_rate * batch_size / 256`.

    Raises:
      UserError: the base learning rate is not positive and finite, or the schedule is unknown.
    """
    if optimizer.schedule not in SCHEDULES:
        raise UserError(
            f"unknown optimizer.schedule '{optimizer.schedule}'{nearest(optimizer.schedule, SCHEDULES)} "
            f"(known: {', '.join(SCHEDULES)})"
        )
    if not 0 < optimizer.base_learning_rate < math.inf:
        raise UserError(
            f"optimizer.base_learning_rate {optimizer.base_learning_rate} must be above 0 and finite"
        )
    peak = optimizer.base_learning_rate * batch_size / BASE_BATCH
    warmup_steps = min(warmup_steps, total_steps)
    constant = optax.constant_schedule(1.0)
    if optimizer.schedule == "poly":
        warmup = optax.linear_schedule(0.0, 1.0, warmup_steps) if warmup_steps else constant
        decay = optax.linear_schedule(peak, optimizer.min_learning_rate, total_steps)
        return lambda step: warmup(step) * decay(step)
    if optimizer.schedule == "step":
        rise = optax.linear_schedule(STEP_WARMUP, 1.0, max(warmup_steps - 1, 1)) if warmup_steps else constant
        drops = optax.piecewise_constant_schedule(peak, {round(share * total_steps): 0.1 for share in DROPS})
        return lambda step: rise(step) * drops(step)
    cosine_steps = max(total_steps - warmup_steps, 1)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
            optax.cosine_decay_schedule(peak, cosine_steps, alpha=optimizer.min_learning_rate / peak),
        ],
        [warmup_steps],
    )


def make_optimizer(
    optimizer: ConfigDict, schedule: optax.Schedule, names: Iterable[str], encoder_prefix: str | None
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay (see `decay_mask`), for a dict of parameters by name.

    Gradients are clipped to `clip_norm` unless it is 0. `layer_decay` scales the whole update, its weight
    decay included, as a parameter group with a smaller learning rate does in PyTorch.

    Args:
      optimizer: the config's keys.
      schedule: step -> learning rate.
      names: of all parameters of the model, frozen ones included.
      encoder_prefix: where the model's encoder is, see `layers`; None for a model without one.

    Raises:
      UserError: an unknown `layer_decay_type`, or `layer_decay` is not 1 for a model without an encoder;
        also see `layers`.
      ValueError: see `layers`.
    """
    kind = optimizer.layer_decay_type
    _check_kind(kind)
    parts = []
    if optimizer.clip_norm:
        parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=functools.partial(decay_mask, decay_grn=optimizer.decay_grn),
    )
    parts.append(adamw)
    if optimizer.layer_decay != 1:
        if encoder_prefix is None:
            raise UserError(
                f"optimizer.layer_decay {optimizer.layer_decay} needs an encoder, and this model "
                "has none; set optimizer.layer_decay=1"
            )
        scales = learning_rate_scales(names, optimizer.layer_decay, kind, encoder_prefix)
        parts.append(
            optax.stateless(lambda updates, _: {name: u * scales[name] for name, u in updates.items()})
        )
    return optax.chain(*parts) if len(parts) > 1 else adamw
