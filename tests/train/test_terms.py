"""Weighted terms: loss and gradient are those of one sum over the global batch, however it is divided."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_task import TinyTask

from cnx2_jax.models.state import split
from cnx2_jax.train import sharding, terms
from cnx2_jax.train.gradient import make_gradient
from cnx2_jax.train.starting import begin, describe
from cnx2_jax.train.terms import Term, mean_of, value

BATCH = 16


class Weighted(TinyTask):
    """A line through points, with two terms: squares by a weight that each sample brings, and an offset."""

    def loss(self, model, batch, keys):
        error = model(batch["x"])[:, 0] - 2 * batch["x"][:, 0] - 1
        squares = Term((batch["weight"] * error**2).sum(), batch["weight"].sum())
        few = Term((batch["few"] * jnp.abs(error)).sum(), batch["few"].sum())
        return {"squares": squares, "few": few}, {"share": mean_of(batch["weight"] > 0)}


class ByModel(Weighted):
    """The same, the first term weighted by what the model gives: no gradient flows through that."""

    def loss(self, model, batch, keys):
        loss, metrics = super().loss(model, batch, keys)
        weight = loss["squares"].weight + jnp.abs(model(batch["x"])).sum()
        return {**loss, "squares": Term(loss["squares"].sum, weight)}, metrics


def make_batch(seed=0, few=True):
    """Ragged weights: of 8 devices' samples some have none at all, and one term counts three samples only."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 5, BATCH).astype(np.float32)
    weight[:2] = weight[6:10] = 0
    chosen = np.zeros(BATCH, np.float32)
    chosen[[3, 4, 15]] = few
    x = rng.standard_normal((BATCH, 1)).astype(np.float32)
    return {"x": x, "weight": weight, "few": chosen}


def expected(batch, kernel, bias, by_model=False):
    """Loss and gradients of kernel and bias, in NumPy and float64."""
    x, weight, few = (np.asarray(batch[name], np.float64) for name in ("x", "weight", "few"))
    output = x * kernel[0] + bias
    error = output[:, 0] - 2 * x[:, 0] - 1
    total = weight.sum() + (np.abs(output).sum() if by_model else 0)
    squares = (weight * error**2).sum() / total
    absolute = (few * np.abs(error)).sum() / few.sum() if few.sum() else 0
    slope = 2 * weight * error / total
    if few.sum():
        slope = slope + few * np.sign(error) / few.sum()
    return {"squares": squares, "few": absolute}, (slope * x[:, 0]).sum(), slope.sum()


def check(parts, kind):
    """Compares with `expected`, on all devices of this process."""
    task = {"Weighted": Weighted, "ByModel": ByModel}[kind](f"accumulation_steps={parts}", "batch_size=16")
    mesh = sharding.make_mesh(task.config.mesh)
    about = describe(task)
    like = jax.eval_shape(
        lambda *arrays: begin(task.config, optax.sgd(1.0), *arrays), about.params, about.variables
    )
    gradient = jax.jit(make_gradient(task, about.graph, like, mesh))
    model = task.init(nnx.Rngs(0))
    arrays = split(model)[1]
    for seed, few in enumerate((True, False, True)):
        batch = make_batch(seed, few)
        placed = next(sharding.put_batches([batch], mesh))
        keys = jax.device_put(jax.random.split(jax.random.key(0), BATCH), sharding.batch_sharding(mesh))
        found = gradient(arrays, {}, placed, keys)
        kernel, bias = (np.asarray(arrays[name], np.float64) for name in ("kernel", "bias"))
        losses, of_kernel, of_bias = expected(batch, kernel, bias, kind == "ByModel")
        assert float(found.loss) == pytest.approx(sum(losses.values()), rel=1e-5)
        assert {n: float(found.metrics[n]) for n in losses} == pytest.approx(losses, rel=1e-5, abs=1e-7)
        assert float(found.metrics["share"]) == pytest.approx((batch["weight"] > 0).mean())
        np.testing.assert_allclose(found.gradients["kernel"], [[of_kernel, 0]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.gradients["bias"], [of_bias, 0], rtol=1e-5, atol=1e-6)


CASES = list(itertools.product((1, 2, 4), ("Weighted", "ByModel")))


@pytest.mark.parametrize(("parts", "kind"), CASES)
def test_terms_equal_one_sum(parts, kind):
    check(parts, kind)


@pytest.mark.parametrize("devices", [2, 8])
def test_terms_do_not_depend_on_the_devices(devices):
    parts = [case for case in CASES if BATCH % (devices * case[0]) == 0]
    program = (
        f"import jax; assert jax.device_count() == {devices}\n"
        f"import test_terms\nfor case in {parts}: test_terms.check(*case)\nprint('equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def test_a_term_without_weight_is_zero_and_has_no_gradient():
    assert float(value(Term(jnp.float32(0), jnp.float32(0)))) == 0
    assert float(terms.inverse(jnp.float32(0))) == 0
    assert float(terms.inverse(jnp.float32(4))) == 0.25


def test_mean_of_leaves_out_what_is_not_valid():
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert float(value(mean_of(values, jnp.array([True, False, True])))) == 2
    assert float(value(mean_of(jnp.array([True, False, False, False])))) == 0.25
