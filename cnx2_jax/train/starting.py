"""The first state of a run: its latest complete checkpoint, the weights it starts from, or fresh ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cnx2_jax.checkpoints import damage
from cnx2_jax.checkpoints.checkpoint import read_metadata
from cnx2_jax.checkpoints.manager import Checkpoints
from cnx2_jax.cluster import processes
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.models.state import Params, parameters, split, variables
from cnx2_jax.train import optimizer, sharding
from cnx2_jax.train.state import TrainState, saved_items
from cnx2_jax.train.task import Task

ON_NONFINITE = ("stop", "skip")


class Description(NamedTuple):
    """A task's model without its arrays.

    Attributes:
      graph: the model's structure.
      params, variables: shapes of its parameters, and of its other arrays.
      encoder_prefix: what the names of the encoder's parameters start with; None if it declares no encoder.
    """

    graph: nnx.GraphDef
    params: Params
    variables: Params
    encoder_prefix: str | None


def describe(task: Task) -> Description:
    """Returns what a task's model is like; no array is made."""
    model = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
    graph, _ = split(model)
    prefix = getattr(model, "encoder_prefix", None)
    return Description(graph, parameters(model), variables(model), prefix)


def begin(
    config: ConfigDict, transform: optax.GradientTransformation, params: Params, others: Params
) -> TrainState:
    """Returns the state of step 0 with these parameters and variables; the average begins at copies of them.

    Raises:
      UserError: an unknown `on_nonfinite`; see `optimizer.trainable`.
    """
    if config.on_nonfinite not in ON_NONFINITE:
        hint = nearest(config.on_nonfinite, ON_NONFINITE)
        raise UserError(
            f"unknown on_nonfinite '{config.on_nonfinite}'{hint} (known: {', '.join(ON_NONFINITE)})"
        )
    trained = optimizer.trainable(params, config.optimizer.trainable)
    ema = jax.tree.map(jnp.copy, {**params, **others}) if config.ema_decay else None
    counts = {"total": jnp.int32(0), "in_a_row": jnp.int32(0)}
    skipped = counts if config.on_nonfinite == "skip" else None
    return TrainState(jnp.int32(0), params, transform.init(trained), ema, skipped, others)


def latest_step(checkpoints: Checkpoints, like: TrainState) -> int | None:
    """Returns the step that the run resumes from, None for a new run; damaged checkpoints are set aside.

    Process 0 decides for all: processes may see a shared folder in different states.

    Raises:
      UserError: see `damage.latest_whole`.
    """
    needed = saved_items(like).keys() - {"skipped"}
    step = damage.latest_whole(checkpoints.directory, sorted(needed)) if processes.is_first() else None
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    checkpoints.reload()
    return None if step < 0 else step


def first_state(
    task: Task,
    transform: optax.GradientTransformation,
    checkpoints: Checkpoints,
    like: TrainState,
    mesh: Mesh,
) -> TrainState:
    """Returns the first state of the run, on the mesh.

    It is the run's latest complete checkpoint, or else what the task starts from, or else fresh.

    Raises:
      UserError: see `latest_step` and the task.
    """
    places = sharding.state_sharding(like, mesh)
    latest = latest_step(checkpoints, like)
    if latest is not None:
        task.adopt(read_metadata(checkpoints.directory / str(latest)))
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, places
        )
        return _restored(checkpoints, latest, shapes)

    def fresh(key) -> Params:
        return split(task.init(nnx.Rngs(key)))[1]

    # This runs once. On CPUs, optimising it takes several times as long as compiling and running it plainly.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    whole = {**places.params, **places.variables}
    create = jax.jit(fresh, out_shardings=whole, compiler_options=options)
    arrays = task.start(create(jax.random.key(task.config.seed)))
    params = jax.device_put({name: arrays[name] for name in like.params}, places.params)
    others = jax.device_put({name: arrays[name] for name in like.variables}, places.variables)
    create_state = jax.jit(
        lambda params, others: begin(task.config, transform, params, others), out_shardings=places
    )
    return create_state(params, others)


def _restored(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    """Restores a step onto the shapes, dtypes and shardings of `like`."""
    wanted = saved_items(like)
    # A run that began to skip updates after this checkpoint has skipped none until then.
    absent = {"skipped"} & wanted.keys() - checkpoints.items(step)
    items = checkpoints.restore(step, {name: item for name, item in wanted.items() if name not in absent})
    skipped = items.get("skipped")
    if like.skipped is not None and skipped is None:
        skipped = {name: jax.device_put(np.int32(0), leaf.sharding) for name, leaf in like.skipped.items()}
    return TrainState(
        jax.device_put(np.int32(step), like.step.sharding),
        items["params"],
        items["opt_state"],
        items.get("ema"),
        skipped,
        items.get("variables", {}),
    )
