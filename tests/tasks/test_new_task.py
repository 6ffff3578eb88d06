"""A task in one file, as docs/contributing.md describes: how much ink is in a digit?"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import Task, defaults, make_task
from cnx2_jax.tasks.models import build
from cnx2_jax.train.loop import fit
from cnx2_jax.train.terms import mean_of
from cnx2_jax.workdir import read_config


class Ink(Task, name="ink"):
    """Regression of an image's mean brightness, by an encoder with one output."""

    ranges = {"ink_scale": (0.1, 100)}  # noqa: RUF012

    @classmethod
    def add_keys(cls, config):
        config.ink_scale = 1.0  # what a wholly white image counts
        config.model.head_init_scale = 1.0  # factor on the initial weights of the head

    def init(self, rngs) -> ConvNeXtV2:
        return build(self.config, 1, rngs, self.platform)

    def error(self, model, batch, keys=None):
        ink = batch["image"].astype("float32").mean(axis=(1, 2, 3)) / 255
        return model(self.normalise(batch["image"]), keys)[:, 0] - self.config.ink_scale * ink

    def loss(self, model, batch, keys):
        return {"loss": mean_of(self.error(model, batch, keys) ** 2)}, {}

    def score(self, model, batch, positions):
        error = self.error(model, batch)
        return {"loss": error**2, "absolute_error": jax.numpy.abs(error)}


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


def make_config(*arguments):
    config = defaults("ink")
    use_digits(config)
    config.model.depths, config.model.dims = (1, 1, 1, 1), (4, 8, 8, 16)
    config.image_size = (8, 8)
    config.batch_size = 64
    config.total_steps = 40
    config.eval_epochs = 0.0
    config.optimizer.base_learning_rate = 0.02
    return override(config, [f"--config.{argument}" for argument in arguments])


def test_a_task_is_one_file_of_few_lines(tmp_path):
    lines = Path(__file__).read_text().partition("class Ink")[2].partition("def make_config")[0].splitlines()
    assert len(lines) < 60
    metrics = fit(make_task(make_config()), tmp_path)
    assert metrics.keys() == {"step", "loss", "absolute_error"}
    assert metrics["absolute_error"] < 0.1
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["loss"] < first["loss"]
    assert read_config(tmp_path).ink_scale == 1.0


def test_its_keys_are_checked():
    with pytest.raises(UserError, match=r"ink_scale 1000\.0 must be at least 0.1 and at most 100"):
        make_config("ink_scale=1000")
    with pytest.raises(UserError, match="unknown config key 'ink_scal'; did you mean 'ink_scale'"):
        make_config("ink_scal=2")


def test_a_task_may_be_in_a_module_of_the_users(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_tasks.py").write_text(
        "from cnx2_jax.tasks import Task\n\n\nclass Mine(Task, name='users_tasks:Mine'):\n    pass\n"
    )
    assert defaults("users_tasks:Mine").task == "users_tasks:Mine"
    with pytest.raises(UserError, match="task 'no_such_module:Mine' cannot be imported"):
        defaults("no_such_module:Mine")
    with pytest.raises(UserError, match="unknown task 'inc'; did you mean 'ink'"):
        defaults("inc")


def test_batch_shapes_are_those_of_its_batches():
    task = make_task(make_config())
    batch = next(task.data.train_batches(0))
    shapes = task.batch_shapes()
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }
    assert isinstance(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))), ConvNeXtV2)
    assert np.asarray(batch["image"]).dtype == np.uint8
