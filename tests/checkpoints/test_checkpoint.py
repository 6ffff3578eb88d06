"""Checkpoints: what is kept, what is found, what is read back, and what damage is called."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cnx2_jax.checkpoints import checkpoint, damage
from cnx2_jax.checkpoints.manager import Checkpoints
from cnx2_jax.errors import UserError
from cnx2_jax.train.state import TrainState, saved_items

METADATA = {"format": "cnx2_jax 1", "class_names": ["a", "b"], "config": {"task": "classify"}}
MAX, MIN = ("accuracy", "max"), ("loss", "min")
NAN = float("nan")


def make_state(seed=0, step=0):
    rng = np.random.default_rng(seed)
    params = {
        "stages.0.0.pwconv1.kernel": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
        "stages.0.0.pwconv1.bias": jnp.float32([-0.0, np.inf, np.nan, 1e-40, 3.4e38, 1 / 3]),
    }
    opt_state = optax.adamw(1e-3).init(params)
    opt_state = jax.tree.map(lambda x: (x + rng.integers(1, 9)).astype(x.dtype), opt_state)
    return TrainState(jnp.int32(step), params, opt_state)


def averaged(state):
    return dataclasses.replace(state, ema={name: value + 1 for name, value in state.params.items()})


def save(directory, steps, *, keep=2, best=MAX):
    """Saves steps, given as {step: metrics}."""
    ours = Checkpoints(directory, keep=keep, best=best)
    for step, metrics in steps.items():
        ours.save(step, saved_items(make_state(step, step)), METADATA, metrics)
    ours.close()


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with steps 3 and 12; not to be changed."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir / "checkpoints", {3: None, 12: {"accuracy": 0.5}})
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """An exported checkpoint of step 12; not to be changed."""
    out = tmp_path_factory.mktemp("out") / "exported"
    checkpoint.write(out, checkpoint.read_params(run / "checkpoints" / "12"), METADATA)
    return out


# What is kept.


@pytest.mark.parametrize(
    ("best", "name", "values", "kept"),
    [
        (MAX, "accuracy", [0.1, 0.9, 0.5, 0.8, 0.7], [2, 4, 5]),
        (MAX, "accuracy", [0.1, 0.2, 0.3, 0.4, 0.5], [4, 5]),
        (MIN, "loss", [0.1, 0.9, 0.5, 0.8, 0.7], [1, 4, 5]),
        (MIN, "loss", [0.9, 0.8, 0.1, 0.4, 0.5], [3, 4, 5]),
        (MAX, "accuracy", [0.1, NAN, 0.9, 0.2, 0.1, NAN], [3, 5, 6]),
        (MIN, "loss", [0.9, 0.1, NAN, 0.4, 0.5], [2, 4, 5]),
        (MAX, "accuracy", [0.9, 0.9, 0.2, 0.1], [2, 3, 4]),  # the latest of equal ones
    ],
)
def test_keeps_the_latest_and_the_best(tmp_path, best, name, values, kept):
    metrics = {step: {name: value, "other": -value} for step, value in enumerate(values, start=1)}
    save(tmp_path / "c", metrics, best=best)
    assert steps_in(tmp_path / "c") == kept


def test_steps_without_evaluation_are_never_the_best(tmp_path):
    save(tmp_path / "c", {1: None, 2: {"accuracy": 0.1}, 3: None, 4: None}, keep=1)
    assert steps_in(tmp_path / "c") == [2, 4]


def test_without_any_evaluation_the_latest_is_best(tmp_path):
    save(tmp_path / "c", {1: None, 2: None})
    ours = Checkpoints(tmp_path / "c", keep=2, best=MAX)
    assert ours.best() == tmp_path / "c" / "2"
    assert not ours.was_evaluated(2)
    ours.save(3, saved_items(make_state(3, 3)), METADATA, {"accuracy": 0.5})
    ours.close()
    ours = Checkpoints(tmp_path / "c", keep=2, best=MAX)
    assert ours.best() == tmp_path / "c" / "3" and ours.was_evaluated(3) and not ours.was_evaluated(9)
    ours.close()


def test_the_best_is_known_after_a_restart(tmp_path):
    save(tmp_path / "c", {1: {"accuracy": 0.9}, 2: {"accuracy": 0.5}}, keep=1)
    save(tmp_path / "c", {3: {"accuracy": 0.6}, 4: {"accuracy": 0.7}}, keep=1)
    assert steps_in(tmp_path / "c") == [1, 4]


# What is restored.


def test_restored_is_what_was_saved_bit_for_bit(tmp_path):
    save(tmp_path / "c", {3: None, 7: None})
    ours = Checkpoints(tmp_path / "c", keep=2, best=MAX)
    assert damage.latest_whole(ours.directory, ("params",)) == 7
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), make_state()
    )
    for step in (3, 7):
        state = ours.restore(step, saved_items(like))
        expected = saved_items(make_state(step, step))
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        assert bits(state) == bits(expected)
    ours.close()
    assert bits(make_state(3)) != bits(make_state(7))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    ours = Checkpoints(tmp_path / "c", keep=2, best=MAX)
    state = make_state(1)
    expected = np.array(state.params["stages.0.0.pwconv1.kernel"])
    ours.save(1, saved_items(state), METADATA, None)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    overwrite(state.params)
    ours.close()
    restored = checkpoint.read_params(tmp_path / "c" / "1")
    np.testing.assert_array_equal(restored["stages.0.0.pwconv1.kernel"], expected)


def test_nothing_is_the_latest_of_a_new_run(tmp_path):
    ours = Checkpoints(tmp_path / "deep" / "c", keep=2, best=MAX)
    assert damage.latest_whole(ours.directory, ("params",)) is None
    ours.close()


def test_unfinished_checkpoints_are_ignored_and_removed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    unfinished = [checkpoints / f"{step}.orbax-checkpoint-tmp" for step in (15, 20)]
    for folder in unfinished:
        shutil.copytree(checkpoints / "12", folder)
        (folder / "commit_success.txt").unlink(missing_ok=True)

    assert checkpoint.find(tmp_path / "run") == checkpoints / "12"
    ours = Checkpoints(checkpoints, keep=2, best=MAX)
    assert damage.latest_whole(ours.directory, ("params",)) == 12
    ours.save(20, saved_items(make_state(20, 20)), METADATA, None)
    ours.close()
    assert not any(folder.exists() for folder in unfinished)
    assert steps_in(checkpoints) == [12, 20]
    assert bits(checkpoint.read_params(checkpoints / "20")) == bits(make_state(20).params)


def test_orbax_names_unfinished_checkpoints_like_this_test_does(tmp_path):
    path = ocp.path.atomicity.AtomicRenameTemporaryPath.from_final(tmp_path / "20")
    assert path.get().name.startswith("20.orbax-checkpoint-tmp")


# What is found.


def test_finds_the_folder_that_a_path_means(run, exported):
    latest = run / "checkpoints" / "12"
    assert checkpoint.find(run) == latest
    assert checkpoint.find(run / "checkpoints") == latest
    assert checkpoint.find(latest) == latest
    assert checkpoint.find(run / "checkpoints" / "3") == run / "checkpoints" / "3"
    assert checkpoint.find(exported) == exported


def test_finds_nothing(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "7").write_text("a file")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "file"):
        with pytest.raises(UserError, match="no checkpoint in") as raised:
            checkpoint.find(path)
        assert str(path) in str(raised.value)


# What is read.


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_reads_params_and_metadata(kind, run, exported):
    folder = checkpoint.find({"run": run, "exported": exported}[kind])
    params = checkpoint.read_params(folder)
    assert bits(params) == bits(make_state(12).params)
    assert params.keys() == make_state(12).params.keys()
    assert checkpoint.read_metadata(folder) == METADATA


def test_exported_checkpoint_needs_nothing_but_orbax(exported):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(exported / "params")
    assert tree.keys() == make_state(12).params.keys()
    assert bits(tree) == bits(make_state(12).params)
    assert json.loads((exported / "card" / "metadata").read_text()) == METADATA
    assert sorted(path.name for path in exported.iterdir()) == ["card", "params"]


@pytest.fixture
def copy(exported, tmp_path):
    """An exported checkpoint to damage."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"config": {}}'])
def test_damaged_metadata(copy, text):
    (copy / "card" / "metadata").unlink()
    if text is not None:
        (copy / "card" / "metadata").write_text(text)
    with pytest.raises(UserError, match="has no readable metadata"):
        checkpoint.read_metadata(copy)


def remove_metadata(params):
    (params / "_METADATA").unlink()


def damage_metadata(params):
    (params / "_METADATA").write_text('{"tree_metadata": {"a')


def remove_manifest(params):
    for path in params.rglob("manifest.ocdbt"):
        path.unlink()


def cut_data(params):
    for path in params.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_data(params):
    for path in params.rglob("d/*"):
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def empty(params):
    shutil.rmtree(params)
    params.mkdir()


# Orbax leaves threads behind that find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage", [remove_metadata, damage_metadata, remove_manifest, cut_data, flip_data, empty]
)
def test_damaged_params(copy, damage):
    damage(copy / "params")
    with pytest.raises(UserError) as raised:
        checkpoint.read_params(copy)
    message = str(raised.value)
    assert message.startswith(f"the parameters in '{copy}' cannot be read: ")
    assert "\n" not in message


# What is written.


def test_write_makes_folders_and_leaves_nothing_else(tmp_path):
    checkpoint.write(tmp_path / "a" / "b", make_state().params, METADATA)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint"])
def test_write_never_overwrites(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
    else:
        checkpoint.write(out, make_state(1).params, METADATA)
    with pytest.raises(UserError, match="out' exists already; nothing was overwritten"):
        checkpoint.write(out, make_state(2).params, METADATA)
    if kind == "file":
        assert out.read_text() == "mine"
    elif kind == "folder":
        assert list(out.iterdir()) == []
    else:
        assert bits(checkpoint.read_params(out)) == bits(make_state(1).params)


def test_write_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.write(tmp_path / "file" / "out", make_state().params, METADATA)
    assert (tmp_path / "file").read_text() == "mine"


# Averaged parameters.


def test_averaged_parameters_come_back_and_are_what_a_user_reads(tmp_path):
    state = averaged(make_state(1, 5))
    ours = Checkpoints(tmp_path / "c", keep=1, best=MAX)
    ours.save(5, saved_items(state), METADATA, None)
    ours.close()
    folder = tmp_path / "c" / "5"
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    again = Checkpoints(tmp_path / "c", keep=1, best=MAX)
    assert bits(again.restore(5, saved_items(like))) == bits(saved_items(state))
    again.close()
    assert checkpoint.has_average(folder)
    assert bits(checkpoint.read_params(folder)) == bits(state.ema)
    assert bits(checkpoint.read_params(folder, averaged=False)) == bits(state.params)


def test_without_an_average_the_parameters_are_read(run):
    folder = run / "checkpoints" / "12"
    assert not checkpoint.has_average(folder)
    assert bits(checkpoint.read_params(folder)) == bits(checkpoint.read_params(folder, averaged=False))
