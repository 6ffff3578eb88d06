"""The train step: one update, as a pure function of state and batch."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnx2_jax.models.state import Params
from cnx2_jax.train.gradient import make_gradient
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.sharding import batch_sharding, state_sharding
from cnx2_jax.train.state import Skipped, TrainState
from cnx2_jax.train.task import Task
from cnx2_jax.types import Batch

BATCH_DRAWS = 2**31  # more than the number of any sample
FINITE = ("loss", "grad_norm", "update_norm")  # an update is finite if and only if these metrics are


def batch_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the random key for everything that is drawn once per batch."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), BATCH_DRAWS)


def sample_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """Returns one random key per sample, a function of the seed, the step and the position in the batch.

    So draws do not depend on the device count, on accumulation, or on earlier draws.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def make_train_step(
    task: Task,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    mesh: Mesh,
):
    """Returns the jitted (state, batch) -> (state, metrics); the state is donated.

    Metrics are scalars: `loss`, `grad_norm` (before clipping), `update_norm` and the task's own; `unreadable`
    is the share of images that were replaced by others, where the batch marks them. Where the state counts
    skipped updates, one that is not finite changes nothing but the step and these counts, which are metrics
    too: `skipped` in total and `skipped_in_a_row`.

    Args:
      task: gives the loss.
      graph: the model's structure.
      optimizer: turns gradients into updates.
      like: the state's shapes.
      mesh: where it all lives.
    """
    config = task.config
    gradient = make_gradient(task, graph, like, mesh)

    def train_step(state: TrainState, batch: Batch):
        batch = dict(batch)
        unreadable = batch.pop("unreadable", None)
        batch = task.prepare(batch, batch_key(config.seed, state.step))
        keys = sample_keys(config.seed, state.step, config.batch_size)
        found = gradient(state.params, state.variables, batch, keys)
        before = trainable(state.params, config.optimizer.trainable)
        updates, opt_state = optimizer.update(found.gradients, state.opt_state, before)
        params = {**state.params, **optax.apply_updates(before, updates)}
        after = TrainState(state.step + 1, params, opt_state, variables=found.variables)
        if state.ema is not None:
            after = dataclasses.replace(after, ema=averaged(after.arrays, state.ema, config.ema_decay))
        norms = {"grad_norm": optax.tree.norm(found.gradients), "update_norm": optax.tree.norm(updates)}
        metrics = {"loss": found.loss, **norms, **found.metrics}
        if unreadable is not None:
            metrics["unreadable"] = unreadable.mean()
        if state.skipped is not None:
            after, counts = _kept_if_finite(state, after, jnp.array([metrics[name] for name in FINITE]))
            metrics |= {"skipped": counts["total"], "skipped_in_a_row": counts["in_a_row"]}
        return after, metrics

    states = state_sharding(like, mesh)
    return jax.jit(
        train_step,
        in_shardings=(states, batch_sharding(mesh)),
        out_shardings=(states, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def averaged(new: Params, average: Params, decay: float) -> Params:
    """Returns the exponential moving average after one more update; what is not floating-point is copied."""
    return {
        name: optax.incremental_update(leaf, average[name], 1 - decay)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for name, leaf in new.items()
    }


def _kept_if_finite(before: TrainState, after: TrainState, values: jax.Array) -> tuple[TrainState, Skipped]:
    """Returns the state after an update, or the one before it with its step counted, and the new counts."""
    assert before.skipped is not None
    finite = jnp.isfinite(values).all()
    counts = {
        "total": before.skipped["total"] + ~finite,
        "in_a_row": jnp.where(finite, 0, before.skipped["in_a_row"] + 1),
    }
    unchanged = dataclasses.replace(before, step=after.step, skipped=None)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, unchanged)
    return dataclasses.replace(kept, skipped=counts), counts
