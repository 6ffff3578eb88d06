"""A task that compiles at once: a line through points, as good as any model for what the loop does."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import override
from cnx2_jax.tasks import defaults
from cnx2_jax.train.terms import mean_of

SETTINGS = [
    "batch_size=8",
    "total_steps=12",
    "log_steps=1",
    "checkpoint_steps=2",
    "eval_epochs=0",
    "keep_checkpoints=3",
    "optimizer.base_learning_rate=0.5",
    "optimizer.weight_decay=0.05",
]


class Line(nnx.Module):
    def __init__(self, rngs, ballast):
        self.kernel = nnx.Param(jnp.array([[0.3, -0.2]]))
        self.bias = nnx.Param(jnp.zeros(2))
        self.ballast = nnx.Param(jax.random.normal(rngs(), (ballast,)))  # to make large files of

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


class Points:
    """Points that are a function of their position; at the steps in `poisoned` they are no numbers."""

    num_train = 96
    num_val = 8

    def __init__(self, poisoned=()):
        self.poisoned = poisoned

    def train_batches(self, start_step, *, process_index=0, process_count=1):
        step = start_step
        while True:
            self.before(step)
            x = np.random.default_rng(step).standard_normal((8, 1)).astype(np.float32)
            bad = step + 1 in self.poisoned
            share = slice(process_index * 8 // process_count, (process_index + 1) * 8 // process_count)
            yield {"x": np.where(bad, np.nan, x)[share].astype(np.float32)}
            step += 1

    def before(self, step):
        """Called before the batch of update `step + 1` is made."""

    def eval_batches(self, *, process_index=0, process_count=1):
        share = 8 // process_count
        x = np.linspace(-1, 1, 8, dtype=np.float32)[process_index * share : (process_index + 1) * share]
        yield {"x": x[:, None], "mask": np.ones(share, bool)}


class TinyTask:
    best = ("loss", "min")

    def __init__(self, *overrides, poisoned=(), ballast=1):
        self.config = override(defaults("pretrain"), [f"--config.{key}" for key in [*SETTINGS, *overrides]])
        self.data = Points(poisoned)
        self.ballast = ballast

    def init(self, rngs):
        return Line(rngs, self.ballast)

    def start(self, arrays):
        return arrays

    def adopt(self, metadata):
        pass

    def begin(self, arrays):
        pass

    def prepare(self, batch, key):
        return batch

    def loss(self, model, batch, keys):
        target = jnp.concatenate([2 * batch["x"] + 1, -batch["x"]], axis=1)
        return {"loss": mean_of((model(batch["x"]) - target) ** 2)}, {}

    def evaluate(self, model, batches):
        return {"loss": float(np.mean([float((model(batch["x"]) ** 2).mean()) for batch in batches]))}

    def pictures(self, model):
        return {}

    def metadata(self):
        return make_metadata(self.config, ())
