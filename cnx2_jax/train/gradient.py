"""The gradient of a global batch: every device computes its own images', and they are summed.

Left to itself, XLA's partitioner computes with kernels as they are stored, split over `fsdp`: activations
are then split by channels and gathered, layer by layer. Here each device gathers the kernels it needs and
works on its own images alone, as in ZeRO (arXiv 1910.02054, stage 3 for what is stored).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from cnx2_jax.models.state import Params, merge, variables
from cnx2_jax.train import terms
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.sharding import AXES, BATCH, state_sharding
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.task import Task
from cnx2_jax.train.terms import Term
from cnx2_jax.types import Batch


class Gradient(NamedTuple):
    """What one global batch gives.

    Attributes:
      loss: float32 scalar: the sum of the loss terms' values.
      metrics: float32 scalars by name: the task's, and each loss term where there are several.
      gradients: of the trainable parameters, each sharded as its parameter.
      variables: the model's other arrays after the forward pass, such as batch statistics.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    gradients: Params
    variables: Params


class _Aux(NamedTuple):
    weights: dict[str, jax.Array]
    metrics: dict[str, Term]
    variables: Params


def make_gradient(task: Task, graph: nnx.GraphDef, like: TrainState, mesh: Mesh) -> Callable:
    """Returns (params, variables, batch, keys) -> Gradient, to be traced in a jitted function.

    The loss is the sum over its terms of (sum over the global batch) / (weight of the global batch), whatever
    the number of devices and of accumulation parts. To know the weights before the first part's backward
    pass, parts are gone through once for the weights alone; of that XLA keeps only what weights depend on,
    so it costs nothing unless they depend on the model, and then a forward pass.

    Batch statistics are those of a part; their running averages go from part to part.

    Args:
      task: gives the loss.
      graph: the model's structure.
      like: the state's shapes.
      mesh: where it all lives.
    """
    config = task.config
    parts = config.accumulation_steps
    specs = {name: place.spec for name, place in state_sharding(like, mesh).params.items()}

    def sums(trained: Params, params: Params, state: Params, batch: Batch, keys: jax.Array):
        model = merge(graph, {**params, **state, **trained})
        loss, metrics = task.loss(model, batch, keys)
        weights = {name: jax.lax.stop_gradient(term.weight) for name, term in loss.items()}
        return {n: term.sum for n, term in loss.items()}, _Aux(weights, dict(metrics), variables(model))

    def of_part(
        trained: Params, params: Params, state: Params, batch: Batch, keys: jax.Array, *, weights=None
    ):
        """Returns sums, aux, gradients and weights; the latter are taken from this part if they are None."""
        total, pullback, aux = jax.vjp(
            lambda trained: sums(trained, params, state, batch, keys), trained, has_aux=True
        )
        weights = _over_devices(aux.weights) if weights is None else weights
        (gradients,) = pullback({n: terms.inverse(weights[n]).astype(total[n].dtype) for n in total})
        return total, aux, gradients, weights

    traced_part = jax.jit(of_part)  # traced once, although `accumulated` asks for its shapes first

    def accumulated(trained: Params, params: Params, state: Params, batch: Batch, keys: jax.Array):
        def divide(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        in_parts = jax.tree.map(divide, (batch, keys))

        def weigh(_, part):
            return None, sums(trained, params, state, *part)[1].weights

        _, each = jax.lax.scan(weigh, None, in_parts)
        weights = _over_devices(jax.tree.map(lambda x: x.sum(axis=0), each))

        def add(carry, part):
            state, before = carry
            total, aux, gradients, _ = traced_part(trained, params, state, *part, weights=weights)
            return (aux.variables, jax.tree.map(jnp.add, before, (total, aux.metrics, gradients))), None

        first = jax.tree.map(lambda x: x[0], in_parts)
        total, aux, gradients, _ = jax.eval_shape(
            traced_part, trained, params, state, *first, weights=weights
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, aux.metrics, gradients))
        (state, (total, metrics, gradients)), _ = jax.lax.scan(add, (state, zeros), in_parts)
        return total, _Aux({}, metrics, state), gradients, weights

    def on_one_device(params: Params, state: Params, batch: Batch, keys: jax.Array):
        whole = {name: _gathered(leaf, specs[name]) for name, leaf in params.items()}
        trained = trainable(whole, config.optimizer.trainable)
        if parts == 1:
            total, aux, gradients, weights = of_part(trained, whole, state, batch, keys)
        else:
            total, aux, gradients, weights = accumulated(trained, whole, state, batch, keys)
        total, metrics = _over_devices((total, aux.metrics))
        values = {name: terms.value(Term(total[name], weights[name])) for name in total}
        scores = {name: terms.value(term) for name, term in metrics.items()}
        if len(values) > 1:
            scores |= values
        return (
            sum(values.values(), jnp.float32(0)),
            scores,
            {name: _scattered(leaf, specs[name]) for name, leaf in gradients.items()},
            _agreed(aux.variables),
        )

    trained_specs = trainable(specs, config.optimizer.trainable)
    replicated = PartitionSpec()
    on_all = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, replicated, BATCH, BATCH),
        out_specs=(replicated, replicated, trained_specs, replicated),
        # The check wants every loop inside a model to say over which devices its carry varies.
        check_vma=False,
    )
    return lambda *arguments: Gradient(*on_all(*arguments))


def _over_devices(values: Any) -> Any:
    return jax.lax.psum(values, AXES)


def _agreed(state: Params) -> Params:
    """Returns the mean of each variable over devices: its value, where layers use the global batch."""
    return {
        name: jax.lax.pmean(leaf, AXES) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for name, leaf in state.items()
    }


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns a whole parameter from the shards that the devices hold."""
    for axis, name in enumerate(spec):
        if name is not None:
            leaf = jax.lax.all_gather(leaf, name, axis=axis, tiled=True)
    return leaf


def _scattered(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns this device's shard of the sum of a gradient over all devices."""
    over = set(AXES)
    for axis, name in enumerate(spec):
        if name is not None:
            gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=axis, tiled=True)
            over.remove(name)
    return jax.lax.psum(gradient, tuple(axis for axis in AXES if axis in over))
