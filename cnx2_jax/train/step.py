"""The train step: one update, as a pure function of state and batch."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnx2_jax.train.gradient import make_gradient
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.sharding import batch_sharding, state_sharding
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.task import Task
from cnx2_jax.types import Batch

BATCH_DRAWS = 2**31  # no sample has this number
FINITE = ("loss", "grad_norm", "update_norm")  # the metrics that are finite exactly if an update is


def batch_key(seed: int, step: jax.Array) -> jax.Array:
    """Returns the random key of what is drawn once for a whole batch."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), BATCH_DRAWS)


def sample_keys(seed: int, step: jax.Array, batch_size: int) -> jax.Array:
    """Returns one random key per sample, a function of the seed, the step and the position in the batch.

    So what is drawn depends neither on the device count nor on accumulation, nor on what came before.
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

    Metrics hold `loss`, `grad_norm` (before clipping), `update_norm` and the task's own, as scalars;
    `unreadable` is the share of images that others stand in for, where the batch says which. Where the state
    counts skipped updates, one that is not finite changes nothing but the step and these counts, which are
    metrics too: `skipped`, of all so far, and `skipped_in_a_row`.

    Args:
      task: gives the loss.
      graph: the model's structure.
      optimizer: makes updates of gradients.
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
        (value, metrics), gradients = gradient(state.params, batch, keys)
        moving = trainable(state.params, config.optimizer.trainable)
        updates, opt_state = optimizer.update(gradients, state.opt_state, moving)
        params = {**state.params, **optax.apply_updates(moving, updates)}
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
        norms = {"grad_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates)}
        metrics = {"loss": value, **norms, **metrics}
        if unreadable is not None:
            metrics["unreadable"] = unreadable.mean()
        after = TrainState(state.step + 1, params, opt_state, ema)
        if state.skipped is not None:
            fine = jnp.isfinite(jnp.array([metrics[name] for name in FINITE])).all()
            counts = {
                "total": state.skipped["total"] + ~fine,
                "in_a_row": jnp.where(fine, 0, state.skipped["in_a_row"] + 1),
            }
            before = dataclasses.replace(state, step=after.step, skipped=None)
            after = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, before)
            after = dataclasses.replace(after, skipped=counts)
            metrics |= {"skipped": counts["total"], "skipped_in_a_row": counts["in_a_row"]}
        return after, metrics

    states = state_sharding(like, mesh)
    return jax.jit(
        train_step,
        in_shardings=(states, batch_sharding(mesh)),
        out_shardings=(states, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
