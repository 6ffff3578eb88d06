"""The state of a run: the pytree that each train step maps to the next one."""

import dataclasses
from typing import Any

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
      opt_state: the optimizer's, of the trainable parameters.
      ema: the exponential moving average of `params` and of floating-point `variables`, if the run keeps one;
        other variables are copied into it.
      skipped: counts of the updates left out because they were not finite, if the run skips such updates.
      variables: arrays of the model that are not parameters, such as batch statistics. The forward pass
        updates them; they are neither optimised nor decayed.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None = None
    skipped: Skipped | None = None
    variables: Params = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> Params:
        """Everything that the model needs: parameters and variables."""
        return {**self.params, **self.variables}


def saved_items(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint holds of a state apart from its step, by the name of the item."""
    items = {
        "params": state.params,
        "opt_state": state.opt_state,
        "ema": state.ema,
        "skipped": state.skipped,
        "variables": state.variables or None,
    }
    return {name: item for name, item in items.items() if item is not None}
