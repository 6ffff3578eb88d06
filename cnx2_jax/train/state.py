"""What a run carries from step to step."""

import dataclasses

import jax
import optax

from cnx2_jax.models.state import Params

Skipped = dict[str, jax.Array]  # int32 scalars: `total`, and `in_a_row` up to now


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The pytree that the train step maps to the next one.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: float32 arrays by official dotted name, such as `stages.2.5.dwconv.kernel`. Flat, so that a
        checkpoint reads like the paper's code and sharding rules are patterns over names.
      opt_state: the optimizer's, of the parameters that train.
      ema: the exponential moving average of `params`, if the run keeps one.
      skipped: the updates left out as they were not finite, if the run leaves such out.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None
    skipped: Skipped | None = None
