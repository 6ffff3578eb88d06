"""What the tasks share: checks, normalisation, starting weights, loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig
from cnx2_jax.models.state import split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, make_task, models, weights


def small(task, *arguments):
    config = defaults(task)
    use_digits(config)
    config.model.depths = (1, 1, 2, 1)
    config.model.dims = (4, 4, 8, 8)
    if task == "pretrain":
        config.model.decoder_dim = 8
    return override(config, [f"--config.{argument}" for argument in arguments])


def shapes(config, classes=0):
    return split(nnx.eval_shape(lambda: models.build(config, classes, nnx.Rngs(0))))[1]


def random_params(config, classes=0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in shapes(config, classes).items()
    }


@pytest.fixture
def stored(tmp_path):
    """Writes a checkpoint of random parameters and returns its path."""

    def write(config, classes=0, seed=0):
        path = tmp_path / f"{config.task}-{classes}-{seed}"
        metadata = make_metadata(config, tuple("abcdefghijkl"[:classes]))
        checkpoint.write(path, random_params(config, classes, seed), metadata)
        return path

    return write


def same(ours, theirs):
    return np.array_equal(np.asarray(ours), np.asarray(theirs))


# Starting weights.


def test_start_from_pretraining_takes_the_encoder(stored):
    path = stored(small("pretrain"), seed=1)
    fresh = random_params(small("classify"), 10, seed=2)
    params = weights.starting_params(path, small("classify"), fresh)
    assert params.keys() == fresh.keys()
    pretrained = random_params(small("pretrain"), seed=1)
    kept = {name for name in params if same(params[name], fresh[name])}
    assert kept == {"norm.scale", "norm.bias", "head.kernel", "head.bias"}
    for name in params.keys() - kept:
        assert same(params[name], pretrained[f"encoder.{name}"]), name


def test_start_from_a_classifier_of_other_classes_takes_all_but_the_head(stored):
    path = stored(small("classify"), classes=3, seed=1)
    fresh = random_params(small("classify"), 10, seed=2)
    params = weights.starting_params(path, small("classify"), fresh)
    trained = random_params(small("classify"), 3, seed=1)
    for name in fresh:
        source = fresh if name.startswith("head.") else trained
        assert same(params[name], source[name]), name


def test_start_from_a_classifier_of_as_many_classes_takes_everything(stored):
    path = stored(small("classify"), classes=10, seed=1)
    params = weights.starting_params(path, small("classify"), random_params(small("classify"), 10, seed=2))
    trained = random_params(small("classify"), 10, seed=1)
    assert params.keys() == trained.keys()
    assert all(same(params[name], trained[name]) for name in trained)


def test_start_from_another_variant(stored):
    path = stored(small("pretrain"))
    config = small("classify", "model.variant=atto", "model.depths=()", "model.dims=()")
    with pytest.raises(UserError) as raised:
        weights.starting_params(path, config, {})
    assert f"checkpoint '{path}' holds variant 'custom', the config asks for 'atto'" in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.dims=(4,4,8,16)", "is of another model: 'downsample_layers.3.1.bias' is (8,) there"),
        ("model.depths=(1,1,3,1)", "has no parameter 'stages.2.2.dwconv.bias': it is of another model"),
        ("model.patch_size=2", "is of another model: 'downsample_layers.0.0.kernel' is"),
    ],
)
def test_start_from_another_custom_model(stored, argument, message):
    path = stored(small("pretrain"))
    config = small("classify", argument)
    with pytest.raises(UserError) as raised:
        weights.starting_params(path, config, random_params(config, 10))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_start_from_nowhere(tmp_path):
    with pytest.raises(UserError, match="nowhere' does not exist"):
        weights.starting_params(tmp_path / "nowhere", small("classify"), {})


def test_classify_starts_from_init_from_only_if_it_is_set(stored):
    fresh = random_params(small("classify"), 10, seed=2)
    assert make_task(small("classify")).start(fresh) is fresh
    path = stored(small("pretrain"), seed=1)
    params = make_task(small("classify", f"init_from={path}")).start(fresh)
    assert not same(params["stages.0.0.dwconv.kernel"], fresh["stages.0.0.dwconv.kernel"])


def test_check_params_says_what_differs():
    like = {"a.kernel": np.zeros((2, 3)), "a.bias": np.zeros(3)}
    weights.check_params(dict(like), like, "there")
    with pytest.raises(UserError, match="'there' is of another model: 'more' has no place here"):
        weights.check_params({**like, "more": np.zeros(1)}, like, "there")
    with pytest.raises(UserError) as raised:
        weights.check_params({"a.kernel": np.zeros((2, 3))}, like, "there")
    assert str(raised.value) == "checkpoint 'there' has no parameter 'a.bias': it is of another model"
    with pytest.raises(UserError) as raised:
        weights.check_params({**like, "a.kernel": np.zeros((2, 4))}, like, "there")
    assert "checkpoint 'there' is of another model: 'a.kernel' is (2, 4) there and (2, 3) here" in str(
        raised.value
    )


# Loading.


@pytest.mark.parametrize(("task", "classes", "kind"), [("pretrain", 0, FCMAE), ("classify", 3, ConvNeXtV2)])
def test_load_gives_model_config_and_classes(stored, task, classes, kind):
    config = small(task, "model.drop_path=0.25")
    path = stored(config, classes=classes, seed=1)
    model, loaded, class_names = weights.load(path)
    assert type(model) is kind
    assert loaded.to_dict() == config.to_dict()
    assert class_names == tuple("abc"[:classes])
    expected = random_params(config, classes, seed=1)
    params = split(model)[1]
    assert params.keys() == expected.keys()
    assert all(same(params[name], expected[name]) for name in expected)


def test_load_of_parameters_that_do_not_fit_the_metadata(tmp_path):
    metadata = make_metadata(small("classify"), ("a", "b"))
    checkpoint.write(tmp_path / "c", random_params(small("classify"), 3), metadata)
    with pytest.raises(UserError, match=r"'head.bias' is \(3,\) there and \(2,\) here"):
        weights.load(tmp_path / "c")


# Checks.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image_size=20"], "image size 20x20 is not a multiple of the stride 8; the nearest that is: 24x24"),
        (["image_size=(16,20)"], "image size 16x20"),
        (["image_size=16", "model.patch_size=4"], "stride 32"),
        (["data.mean=(0.1,0.2,0.3)"], r"data.mean has 3 value(s) for model.in_chans 1"),
        (["model.in_chans=3"], r"data.mean has 1 value(s) for model.in_chans 3"),
        (["data.std=()"], r"data.std has 0 value(s)"),
        (["data.crop_scale=0.5"], "data.crop_scale (0.5,) must be two numbers"),
        (["data.crop_ratio=(2,1)"], "data.crop_ratio (2, 1) must be two numbers"),
        (["data.crop_scale=(0,1)"], "data.crop_scale (0, 1) must be two numbers"),
    ],
)
@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_tasks_check_their_config(task, arguments, message):
    with pytest.raises(UserError) as raised:
        make_task(small(task, *arguments))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.variant=tinny", "model.depths=()", "model.dims=()"], "did you mean 'tiny'"),
        (["model.variant=atto"], "neither with a named variant"),
        (["model.depths=()", "model.dims=()"], "give both with model.variant=custom"),
        (["model.dims=(4,4,8)"], "four positive dims"),
        (["model.dtype=bfloat6"], "did you mean 'bfloat16'"),
        (["model.patch_size=3"], "patch_size 3"),
        (["model.drop_path=1"], "drop_path 1.0"),
        (["model.scan=maybe"], "unknown model.scan 'maybe'"),
        (["model.remat=blok"], "unknown remat policy 'blok'; did you mean 'block'"),
    ],
)
def test_build_refuses(arguments, message):
    with pytest.raises(UserError) as raised:
        jax.eval_shape(lambda: split(models.build(small("classify", *arguments), 10, nnx.Rngs(0)))[1])
    assert message in str(raised.value)


def test_unknown_task():
    config = small("classify")
    config.task = "clasify"
    with pytest.raises(UserError, match="unknown task 'clasify'; did you mean 'classify'"):
        make_task(config)


def test_an_encoder_without_its_decoder_gives_the_mean_of_its_last_map(build):
    fcmae = build(FCMAE, EncoderConfig((1, 1, 2, 1), (4, 4, 8, 12), in_chans=1, patch_size=1), decoder_dim=8)
    encoder = models.without_decoder(fcmae)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((3, 16, 24, 1)), jnp.float32)
    mean = np.asarray(fcmae.encoder.features(images)[-1], np.float64).mean(axis=(1, 2))
    expected = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(encoder(images), expected, atol=1e-4)
    assert models.without_decoder(encoder) is encoder
