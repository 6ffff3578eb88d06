"""One update: independent of accumulation, donated, the same in bfloat16; keys by sample."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnx2_jax.configuration import override
from cnx2_jax.models.state import merge, split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, make_task
from cnx2_jax.train import sharding, terms
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.state import TrainState
from cnx2_jax.train.step import batch_key, make_train_step, sample_keys

BATCH = 16


pytestmark = pytest.mark.usefixtures("compile_quickly")


def small_task(*arguments):
    """FCMAE with drop path, on digits."""
    config = defaults("pretrain")
    use_digits(config)
    config.batch_size = BATCH
    config.image_size = (16, 16)
    config.model.depths = (1, 1, 1, 1)
    config.model.dims = (8, 8, 16, 16)
    config.model.decoder_dim = 16
    config.model.drop_path = 0.5
    return make_task(override(config, [f"--config.{argument}" for argument in arguments]))


@functools.cache
def first_params():
    """Parameters of useful size, as NumPy arrays: at the usual ones every gradient is tiny."""
    task = small_task()
    shapes = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))[1]
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith("kernel"):
            inputs = 49 if len(shape) == 3 else math.prod(shape[:-1])
            return rng.standard_normal(shape) / math.sqrt(inputs)
        return float(name.endswith("scale")) + 0.3 * rng.standard_normal(shape)

    return {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in sorted(shapes.items())}


@functools.cache
def some_batches(count):
    return list(itertools.islice(small_task().data.train_batches(0), count))


@functools.cache
def compiled(parts=1, dtype="float32", trained="", ema=0.0):
    """Returns the train step and a function that makes its first state."""
    task = small_task(
        f"accumulation_steps={parts}",
        f"model.dtype={dtype}",
        f"optimizer.trainable={trained}",
        f"ema_decay={ema}",
    )
    # The large epsilon keeps Adam from turning the rounding of a gradient near zero into whole steps.
    transform = optax.adam(1e-2, eps=1e-2)
    graph, _ = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    mesh = sharding.make_mesh(task.config.mesh)

    def first():
        params = {name: jnp.array(value) for name, value in first_params().items()}
        moments = transform.init(trainable(params, trained))
        average = {name: jnp.array(value) for name, value in first_params().items()} if ema else None
        return TrainState(jnp.int32(0), params, moments, average)

    like = jax.eval_shape(first)
    step = make_train_step(task, graph, transform, like, mesh)
    return step, lambda: jax.device_put(first(), sharding.state_sharding(like, mesh))


@functools.cache
def run(steps, **options):
    """Returns the state after some steps, on the host, and the metrics of each."""
    step, first = compiled(**options)
    state, seen = first(), []
    for batch in some_batches(50)[:steps]:
        state, metrics = step(state, batch)
        seen.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), seen


def test_accumulation_changes_nothing():
    state, metrics = run(2)
    other_state, other_metrics = run(2, parts=4, ema=0.75)  # the program of another test
    assert {"loss", "grad_norm"} <= metrics[0].keys()
    for ours, theirs in zip(metrics, other_metrics, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)  # sums of many terms, in another order
    assert int(other_state.step) == int(state.step) == 2
    for name, value in state.params.items():
        np.testing.assert_allclose(other_state.params[name], value, rtol=0, atol=1e-5, err_msg=name)
    moved = [np.abs(value - first_params()[name]).max() for name, value in state.params.items()]
    assert np.median(moved) > 1e-3  # the tolerance is a small part of what was learned


def test_loss_is_the_mean_over_samples_each_with_its_own_key():
    task = small_task()
    graph, _ = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    batch = some_batches(50)[0]
    keys = sample_keys(task.config.seed, jnp.int32(0), BATCH)

    @jax.jit
    def one(params, image, key):
        loss, _ = task.loss(merge(graph, params), {"image": image[None]}, key[None])
        return terms.value(loss["loss"])

    losses = [float(one(first_params(), batch["image"][i], keys[i])) for i in range(BATCH)]
    assert np.std(losses) > 0.01
    assert run(2)[1][0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_bfloat16_tracks_float32():
    state, metrics = run(50, dtype="bfloat16")
    losses = [row["loss"] for row in metrics]
    expected = [row["loss"] for row in run(50)[1]]
    assert {value.dtype for value in state.params.values()} == {np.dtype("float32")}
    assert losses != expected  # bfloat16 was used
    assert np.mean(expected[-10:]) < 0.9 * np.mean(expected[:10])  # and something was learned
    assert losses[-1] == pytest.approx(expected[-1], rel=0.02)
    assert np.mean(losses[-10:]) == pytest.approx(np.mean(expected[-10:]), rel=0.02)


def test_state_is_donated():
    step, first = compiled()
    state = first()
    after, _ = step(state, some_batches(50)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def key_data(seed, step, size):
    return np.asarray(jax.random.key_data(sample_keys(seed, jnp.int32(step), size)))


def test_sample_keys_depend_on_seed_step_and_position_alone():
    keys = key_data(0, 5, 8)
    np.testing.assert_array_equal(keys[:4], key_data(0, 5, 4))  # not on the batch size
    np.testing.assert_array_equal(keys, key_data(0, 5, 8))  # not on what was drawn before
    traced = jax.jit(lambda step: jax.random.key_data(sample_keys(0, step, 8)))(5)
    np.testing.assert_array_equal(keys, traced)
    others = [key_data(0, 5, 8), key_data(0, 6, 8), key_data(1, 5, 8), key_data(5, 0, 8), key_data(-1, 5, 8)]
    assert len(np.unique(np.concatenate(others), axis=0)) == 8 * len(others)


def test_unreadable_images_are_counted_and_change_nothing_else():
    (batch,) = some_batches(50)[:1]
    unreadable = np.arange(BATCH) % 4 == 1
    step, first = compiled()
    state, metrics = step(first(), {**batch, "unreadable": unreadable})
    expected, others = run(1)
    assert float(metrics.pop("unreadable")) == 0.25
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(others[0], rel=1e-6)
    for name, value in expected.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=0, atol=1e-6)


def test_batch_key_is_no_samples_and_new_at_every_step():
    keys = [batch_key(3, jnp.int32(step)) for step in (0, 1)] + [batch_key(4, jnp.int32(0))]
    samples = sample_keys(3, jnp.int32(0), 1000)
    data = np.concatenate([jax.random.key_data(jnp.stack(keys)), jax.random.key_data(samples)])
    assert len(np.unique(data, axis=0)) == len(data)


def test_the_average_follows_the_parameters():
    average = {name: value.astype(np.float64) for name, value in first_params().items()}
    for steps in (1, 2, 3):
        params = run(steps)[0].params
        average = {name: 0.75 * average[name] + 0.25 * params[name] for name in average}
    state, metrics = run(3, parts=4, ema=0.75)
    for name, value in average.items():
        np.testing.assert_allclose(state.ema[name], value, rtol=0, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(state.params[name], params[name], rtol=0, atol=2e-5, err_msg=name)
    assert np.abs(state.ema["pred.kernel"] - params["pred.kernel"]).max() > 1e-3
    assert metrics[2]["loss"] == pytest.approx(run(3)[1][2]["loss"], rel=1e-5)
    assert run(3)[0].ema is None


def test_only_what_is_trainable_moves():
    state, metrics = run(2, trained="^(pred|mask_token)", parts=2)
    moved = {name for name, value in state.params.items() if (value != first_params()[name]).any()}
    assert moved == {"pred.kernel", "pred.bias", "mask_token"}
    names = {
        key.key
        for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }
    assert names == moved  # nothing is kept for the others
    assert 0 < metrics[0]["grad_norm"] < run(1)[1][0]["grad_norm"]
    assert metrics[0]["loss"] == pytest.approx(run(1)[1][0]["loss"], rel=1e-5)
