"""The program of a run, from its task and mesh alone, so that it can be compiled for any device."""

import dataclasses

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from cnx2_jax import configuration
from cnx2_jax.train import optimizer, sharding, starting
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.step import make_train_step
from cnx2_jax.train.task import Task


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a run compiles and executes.

    Attributes:
      total_steps: the length of the run in updates.
      schedule: step -> learning rate.
      graph: the model's structure.
      transform: turns gradients into updates.
      like: the state's shapes.
      step: the jitted (state, batch) -> (state, metrics); see `make_train_step`.
    """

    total_steps: int
    schedule: optax.Schedule
    graph: nnx.GraphDef
    transform: optax.GradientTransformation
    like: TrainState
    step: jax.stages.Wrapped


def make_program(task: Task, mesh: Mesh) -> Program:
    """Returns the program of a run; no array is made.

    Raises:
      UserError: see `sharding.check_batch`, the optimizer and the task.
    """
    config = task.config
    sharding.check_batch(config.batch_size, config.accumulation_steps, mesh)
    num_train = task.data.num_train
    total = configuration.total_steps(config, num_train)
    schedule = optimizer.learning_rate_schedule(
        config.optimizer,
        config.batch_size,
        configuration.warmup_steps(config, num_train),
        total,
    )
    model = starting.describe(task)
    transform = optimizer.make_optimizer(config.optimizer, schedule, model.params, model.encoder_prefix)
    like = jax.eval_shape(
        lambda *arrays: starting.begin(config, transform, *arrays), model.params, model.variables
    )
    step = make_train_step(task, model.graph, transform, like, mesh)
    # Compiled as a whole: its operations one by one take seconds.
    return Program(total, jax.jit(schedule), model.graph, transform, like, step)
