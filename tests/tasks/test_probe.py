"""The linear probe: features computed once, a head that learns, and a checkpoint like any classifier's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.linear_model import LogisticRegression

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import override
from cnx2_jax.data.sources import open_source
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import classification
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import merge, split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, make_task, models, probe, weights
from cnx2_jax.tasks.probe import Probe
from cnx2_jax.train.loop import fit


def small(*arguments, task="probe"):
    config = defaults(task)
    use_digits(config)
    config.image_size = (16, 16)
    config.model.depths = (1, 1, 1, 1)
    config.model.dims = (8, 8, 16, 32)
    config.batch_size = 64
    if task == "pretrain":
        config.model.decoder_dim = 8
    else:
        config.optimizer.base_learning_rate = 8e-2
        config.optimizer.weight_decay = 0.0
    return override(config, [f"--config.{argument}" for argument in arguments])


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


@functools.cache
def initial(seed):
    """The arrays that a probe on digits starts with; all probes here have the same shapes."""
    task = make_task(small())
    return jax.jit(lambda key: split(task.init(nnx.Rngs(key)))[1])(jax.random.key(seed))


def begun(*arguments):
    """A probe that has its features, as after the start of a run."""
    task = make_task(small(*arguments))
    task.start(initial(task.config.seed))
    return task


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An FCMAE checkpoint of random parameters, of useful size."""
    config = small(task="pretrain")
    shapes = split(nnx.eval_shape(lambda: models.build(config, 0, nnx.Rngs(0))))[1]
    rng = np.random.default_rng(0)

    def draw(name, shape):
        inputs = np.prod(shape[: 2 if len(shape) == 3 else -1])
        noise = rng.standard_normal(shape)
        return noise / np.sqrt(inputs) if name.endswith("kernel") else name.endswith("scale") + 0.3 * noise

    path = tmp_path_factory.mktemp("encoder") / "stored"
    params = {name: draw(name, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    checkpoint.write(path, params, make_metadata(config, ()))
    return path


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    """A trained probe: its task, workdir and last metrics; not to be changed."""
    workdir = tmp_path_factory.mktemp("probe") / "run"
    task = make_task(small(f"init_from={encoder}", "total_epochs=40", "eval_epochs=0"))
    return task, workdir, fit(task, workdir)


def test_it_does_about_as_well_as_logistic_regression(run):
    task, _, metrics = run
    (train, labels), (val, val_labels) = task.data._train, task.data._val
    peer = LogisticRegression(max_iter=2000).fit(train, labels)
    expected = peer.score(val, val_labels)
    assert metrics["accuracy"] == pytest.approx(expected, abs=0.03)
    assert metrics["accuracy"] > 0.6


def test_its_checkpoint_is_a_classifier_of_images(run):
    task, workdir, metrics = run
    model, config, names = weights.load(workdir)
    assert names == task.class_names
    found = classification.evaluate(model, config.data.mean, config.data.std, task.images.eval_batches())
    assert found["accuracy"] == pytest.approx(metrics["accuracy"], abs=1 / 359 + 1e-9)
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_the_encoder_stays_and_the_norm_standardises(run, encoder):
    task, workdir, _ = run
    params = checkpoint.read_params(checkpoint.find(workdir))
    source = checkpoint.read_params(encoder)
    same = [name for name in params if not name.startswith(("norm.", "head."))]
    assert len(same) > 40
    for name in same:
        np.testing.assert_array_equal(params[name], source[f"encoder.{name}"], err_msg=name)
    assert np.abs(params["head.kernel"]).max() > 0.1
    model = weights.load(workdir)[0]
    batches = list(itertools.islice(task.images.eval_batches(), 5))
    images = jnp.concatenate(
        [normalise(batch["image"], task.config.data.mean, task.config.data.std) for batch in batches]
    )
    vectors = jax.jit(lambda model, images: model.pooled(images))(model, images)
    np.testing.assert_allclose(vectors.mean(axis=0), 0, atol=0.35)
    np.testing.assert_allclose(vectors.std(axis=0), 1, atol=0.35)


def test_a_classifier_can_be_probed_too(run):
    _, workdir, _ = run
    task = make_task(small(f"init_from={workdir}"))
    graph, fresh = split(task.init(nnx.Rngs(0)))
    params = task.start(fresh)
    images = task.normalise(next(iter(task.images.eval_batches()))["image"])
    vectors = merge(graph, jax.tree.map(jnp.asarray, params)).pooled(images)
    expected = next(iter(task.data.eval_batches()))["features"]
    np.testing.assert_allclose(vectors, expected, atol=1e-3)


def test_without_a_checkpoint_the_encoder_is_random_and_the_same_at_every_start():
    first, again, other = (
        next(begun(f"seed={seed}").data.train_batches(0))["features"] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


# Batches.


class Images:
    """Two splits whose records are told apart by their labels; nothing is read."""

    class_names = ("a", "b")
    train, val = "train", "val"


def numbered(batch_size, train, val):
    config = small(f"batch_size={batch_size}")
    data = probe.FeatureData(Images(), config)
    splits = (
        (
            np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32),
            np.arange(count, dtype=np.int32),
        )
        for count in (train, val)
    )
    data._hold(*splits)
    return data


def test_every_epoch_is_a_permutation_of_its_own():
    batches = numbered(7, 50, 3).train_batches(0)
    records = np.concatenate([batch["label"] for batch in itertools.islice(batches, 15)])
    first, second = records[:50], records[50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first != second).any()


def test_any_step_can_be_entered_and_hosts_share_its_batch():
    data = numbered(8, 21, 3)
    whole = list(itertools.islice(data.train_batches(0), 9))
    for start in (3, 8):
        batch = next(data.train_batches(start))
        np.testing.assert_array_equal(batch["label"], whole[start]["label"])
        np.testing.assert_array_equal(batch["features"], whole[start]["features"])
    parts = [next(data.train_batches(4, process_index=host, process_count=4)) for host in range(4)]
    for name in ("features", "label"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[4][name])


def test_evaluation_sees_every_image_once():
    data = numbered(8, 21, 11)
    for hosts in (1, 2):
        seen, counts = [], []
        for host in range(hosts):
            batches = list(data.eval_batches(process_index=host, process_count=hosts))
            seen += [label for batch in batches for label in batch["label"][batch["mask"]]]
            counts.append([len(batch["label"]) for batch in batches])
        assert sorted(seen) == list(range(11))
        assert counts == [[8 // hosts] * 2] * hosts


def test_features_are_standardised_over_the_training_images():
    data = numbered(50, 50, 20)
    batch = next(data.train_batches(0))
    np.testing.assert_allclose(batch["features"].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(batch["features"].std(axis=0), 1, atol=1e-5)


# The cache.


def test_features_are_kept_for_other_runs(encoder, tmp_path, monkeypatch):
    def open_probe(*arguments):
        return begun(f"init_from={encoder}", f"data.feature_cache={tmp_path}", *arguments)

    expected = next(open_probe().data.train_batches(2))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2

    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(probe, "all_features", refuse)
    found = next(open_probe("optimizer.base_learning_rate=0.5", "total_epochs=3").data.train_batches(2))
    np.testing.assert_array_equal(found["features"], expected["features"])
    np.testing.assert_array_equal(found["label"], expected["label"])
    # Whatever changes the features makes them be computed: images, their preparation, the encoder.
    for change in ("data.train_per_class=5", "data.eval_crop=0.9", "data.mean=(0.2,)", "init_from="):
        with pytest.raises(AssertionError, match="computed again"):
            open_probe(change)
    assert sorted(tmp_path.iterdir()) == files  # nothing half-written is left

    whole = {path: path.read_bytes() for path in files}
    for damaged in (b"", b"no zip file", *(content[:1000] for content in whole.values())):
        for path in files:
            path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"data.feature_cache: .*\.npz' cannot be read .*; remove it"):
            open_probe()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"data.feature_cache: cannot write "):
        begun(f"data.feature_cache={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_images_of_the_same_names_are_other_features(encoder, tmp_path):
    found = []
    for seed in (0, 0, 1):
        rng = np.random.default_rng(seed)
        for label, index in itertools.product("ab", range(4)):
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8))
            picture.save(tmp_path / "images" / label / f"{index}.png")
        begun(
            f"init_from={encoder}",
            f"data.feature_cache={tmp_path / 'cache'}",
            "data.source=folder",
            f"data.root={tmp_path / 'images'}",
            "data.val_fraction=0.3",
            "batch_size=2",
        )
        found.append(len(list((tmp_path / "cache").iterdir())))
    assert found == [2, 2, 4]


def test_other_bands_of_the_same_arrays_are_other_features():
    config = small()
    source = open_source(config.data, "train", 0)
    names = set()
    for bands in ("", "2,1", "1,2"):
        config.data.use_bands = bands
        names.add(probe._name("encoder", source, config))
    assert len(names) == 3


def test_going_on_needs_the_source_of_the_encoder_no_more(run, encoder, tmp_path):
    """What a run goes on with is in its own checkpoint, whatever has become of `init_from` since."""
    task, workdir, _ = run
    again = make_task(small("init_from=/gone", "total_epochs=40", "eval_epochs=0"))
    again.begin(checkpoint.read_params(checkpoint.find(workdir)))
    ours, theirs = next(again.data.train_batches(7)), next(task.data.train_batches(7))
    np.testing.assert_array_equal(ours["features"], theirs["features"])


def test_only_the_head_may_be_trained():
    assert isinstance(make_task(small("optimizer.trainable=head.kernel")), Probe)
    with pytest.raises(UserError, match=r"'\^stages' has 'stages.* but a linear probe trains the head alone"):
        make_task(small("optimizer.trainable=^stages"))
