"""The gradient of a global batch: every device computes its own images', and they are summed.

Left to itself, XLA's partitioner computes with kernels as they are stored, split over `fsdp`: activations
are then split by channels and gathered, layer by layer. Here each device gathers the kernels it needs and
works on its own images alone, as in ZeRO (arXiv 1910.02054, stage 3 for what is stored).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from cnx2_jax.models.state import Params, merge
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.sharding import AXES, BATCH, state_sharding
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.task import Task
from cnx2_jax.types import Batch


def make_gradient(task: Task, graph: nnx.GraphDef, like: TrainState, mesh: Mesh) -> Callable:
    """Returns (params, batch, keys) -> ((loss, metrics), gradients), to be traced in a jitted function.

    Loss and metrics are means over the global batch; gradients are those of the parameters that train, each
    where its parameter lives. What `accumulation_steps` divides is reduced once, in the end.

    Args:
      task: gives the loss.
      graph: the model's structure.
      like: the state's shapes.
      mesh: where it all lives.
    """
    config = task.config
    parts = config.accumulation_steps
    specs = {name: place.spec for name, place in state_sharding(like, mesh).params.items()}

    def loss(moving: Params, params: Params, batch: Batch, keys: jax.Array):
        return task.loss(merge(graph, {**params, **moving}), batch, keys)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def accumulated(moving: Params, params: Params, batch: Batch, keys: jax.Array):
        def divide(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(moving, params, *part)), None

        divided = jax.tree.map(divide, (batch, keys))
        first = jax.tree.map(lambda x: x[0], divided)
        shapes = jax.eval_shape(gradient, moving, params, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, divided)
        return jax.tree.map(lambda x: x / parts, total)

    def on_one_device(params: Params, batch: Batch, keys: jax.Array):
        whole = {name: _gathered(leaf, specs[name]) for name, leaf in params.items()}
        moving = trainable(whole, config.optimizer.trainable)
        compute = gradient if parts == 1 else accumulated
        scores, gradients = compute(moving, whole, batch, keys)
        means = {name: _scattered(leaf, specs[name]) / mesh.size for name, leaf in gradients.items()}
        return jax.lax.pmean(scores, AXES), means

    moving_specs = trainable(specs, config.optimizer.trainable)
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, BATCH, BATCH),
        out_specs=(PartitionSpec(), moving_specs),
        # The check wants every loop inside a model to say over which devices its carry varies.
        check_vma=False,
    )


def _gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns the whole of a parameter of which this device holds a part."""
    for axis, name in enumerate(spec):
        if name is not None:
            leaf = jax.lax.all_gather(leaf, name, axis=axis, tiled=True)
    return leaf


def _scattered(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns this device's part of the sum of a gradient over all devices."""
    over = set(AXES)
    for axis, name in enumerate(spec):
        if name is not None:
            gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=axis, tiled=True)
            over.remove(name)
    return jax.lax.psum(gradient, tuple(axis for axis in AXES if axis in over))
