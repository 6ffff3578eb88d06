"""What a run carries from step to step, and the way between a module and its named parameters."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

Params = dict[str, jax.Array]
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


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its structure and its parameters by dotted name."""
    graph, state = nnx.split(model)
    return graph, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graph: nnx.GraphDef, params: Params) -> Any:
    """Inverse of `split`: the module of that class, which shares the arrays."""
    paths = {tuple(int(p) if p.isdigit() else p for p in name.split(".")): name for name in params}
    variables: dict = {path: nnx.Param(params[name]) for path, name in paths.items()}
    state = nnx.from_flat_state(variables)
    return nnx.merge(graph, state)
