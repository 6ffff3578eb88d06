"""Arrays that are not parameters: updated by the step, saved, restored, averaged, never optimised."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_task import Line, TinyTask

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.models.state import merge, parameters, split, variables
from cnx2_jax.train.loop import fit
from cnx2_jax.train.terms import mean_of


class Counted(Line):
    """A line that keeps a running mean of its inputs, and counts its batches."""

    def __init__(self, rngs, ballast):
        super().__init__(rngs, ballast)
        self.mean = nnx.BatchStat(jnp.zeros(1))
        self.batches = nnx.BatchStat(jnp.int32(0))

    def __call__(self, x):
        return super().__call__(x) + 0 * self.mean[...]

    def see(self, x):
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(axis=0)
        self.batches[...] = self.batches[...] + 1


class CountedTask(TinyTask):
    def init(self, rngs):
        return Counted(rngs, self.ballast)

    def loss(self, model, batch, keys):
        model.see(batch["x"])
        target = jnp.concatenate([2 * batch["x"] + 1, -batch["x"]], axis=1)
        return {"loss": mean_of((model(batch["x"]) - target) ** 2)}, {}

    def evaluate(self, model, batches):
        return {**super().evaluate(model, batches), "mean": float(model.mean[0])}


def means(steps):
    """The running mean after each step, by NumPy, in float32 as the model computes it."""
    mean, found = np.zeros(1, np.float32), []
    for step in range(steps):
        x = np.random.default_rng(step).standard_normal((8, 1)).astype(np.float32)
        mean = np.float32(0.9) * mean + np.float32(0.1) * x.mean(axis=0)
        found.append(mean)
    return found


def test_parameters_and_variables_are_told_apart():
    model = Counted(nnx.Rngs(0), 1)
    assert parameters(model).keys() == {"kernel", "bias", "ballast"}
    assert variables(model).keys() == {"mean", "batches"}
    graph, arrays = split(model)
    again = merge(graph, arrays)
    assert isinstance(again.mean, nnx.BatchStat) and isinstance(again.kernel, nnx.Param)


def test_a_run_updates_saves_and_averages_them(tmp_path):
    metrics = fit(CountedTask("ema_decay=0.5", "checkpoint_steps=6"), tmp_path)
    expected = means(12)
    folder = tmp_path / "checkpoints" / "12"
    arrays = checkpoint.read_params(folder, averaged=False)
    assert int(arrays["batches"]) == 12
    np.testing.assert_allclose(arrays["mean"], expected[-1], rtol=1e-6)
    assert metrics["mean"] == pytest.approx(float(expected[-1][0]), rel=1e-6)
    average = np.zeros(1)
    for mean in expected:
        average = 0.5 * average + 0.5 * mean
    averaged = checkpoint.read_params(folder)
    np.testing.assert_allclose(averaged["mean"], average, rtol=1e-5)
    assert int(averaged["batches"]) == 12  # what is not floating-point is copied
    assert metrics["ema_mean"] == pytest.approx(float(average[0]), rel=1e-5)


def test_they_have_no_place_in_the_optimizer(tmp_path):
    fit(CountedTask("total_steps=2"), tmp_path)
    tree = json.loads((tmp_path / "checkpoints" / "2" / "opt_state" / "_METADATA").read_text())[
        "tree_metadata"
    ]
    names = {key["key"] for leaf in tree.values() for key in leaf["key_metadata"]}
    assert "kernel" in names and not names & {"mean", "batches"}


def test_resuming_restores_them_bit_for_bit(tmp_path):
    whole = fit(CountedTask("ema_decay=0.5"), tmp_path / "whole")
    # A run that is stopped at step 6, and resumed.
    task = CountedTask("ema_decay=0.5")

    def stop(step):
        if step == 6:
            raise RuntimeError("killed")

    task.data.before = stop
    with pytest.raises(RuntimeError, match="killed"):
        fit(task, tmp_path / "parts")
    assert fit(CountedTask("ema_decay=0.5"), tmp_path / "parts") == whole
    for averaged in (False, True):
        one, other = (
            checkpoint.read_params(tmp_path / run / "checkpoints" / "12", averaged=averaged)
            for run in ("whole", "parts")
        )
        assert one.keys() == other.keys() >= {"mean", "batches", "kernel"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_skipped_update_leaves_them_as_they_were(tmp_path):
    fit(CountedTask("on_nonfinite=skip", poisoned={12}), tmp_path)
    arrays = checkpoint.read_params(tmp_path / "checkpoints" / "12")
    assert int(arrays["batches"]) == 11
    np.testing.assert_allclose(arrays["mean"], means(11)[-1], rtol=1e-6)


def test_accumulation_parts_follow_each_other(tmp_path):
    fit(CountedTask("accumulation_steps=2", "total_steps=3"), tmp_path)
    assert int(checkpoint.read_params(tmp_path / "checkpoints" / "3")["batches"]) == 6
    assert jax.device_count() == 1
