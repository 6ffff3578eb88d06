"""An UperNet in every export format and through the commands; its names are tested in test_upernet.py."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.interop import export
from cnx2_jax.interop.export import FORMATS, Job
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.models import EncoderConfig, UperNet
from cnx2_jax.models.state import merge, split
from cnx2_jax.tasks import make_task, models, weights
from cnx2_jax.tasks.base import Described

NAMES = ("sky", "tree", "road")
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model(build):
    """A small UperNet; variances are positive, and none of its running averages is as at the start."""
    create = functools.partial(
        UperNet, EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32), patch_size=2), num_classes=len(NAMES)
    )
    made = build(create, channels=12, auxiliary_channels=8, pool_scales=(1, 2, 3))
    graph, arrays = split(made)
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        if name.endswith((".mean", ".var")):
            arrays[name] = rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
    return merge(graph, arrays)


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_logits(name, uint8, model, tmp_path):
    pytest.importorskip(FORMATS[name].writer)
    pytest.importorskip(FORMATS[name].runtime)
    if name == "safetensors" and uint8:
        return  # weights alone
    inference = InferenceModel(model, SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), uint8=uint8)
    facts = Facts(NAMES, SIZE, 1.0, inference.mean, inference.std)
    result = export.export(tmp_path / "out", FORMATS[name], Job(tmp_path, inference, facts))
    assert result["runtime"] and 0 <= result["max_difference"] < 1e-5 * result["largest"]
    images = inference.some_images(2)
    assert FORMATS[name].run(tmp_path / "out", images).shape == (2, *SIZE, len(NAMES))


def test_the_reference_is_the_models_own_result(model):
    inference = InferenceModel(model, SIZE, mean=(0.5,) * 3, std=(0.2,) * 3, uint8=False)
    images = inference.some_images(2)
    expected = jax.jit(lambda model, x: model.segment(x))(model, images)
    np.testing.assert_allclose(inference.reference(images), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def stored(model, tmp_path):
    """A checkpoint of the network."""
    sizes = [
        "model.depths=(1,1,2,1)",
        "model.dims=(8,16,24,32)",
        "model.channels=12",
        "model.auxiliary_channels=8",
        "model.pool_scales=(1,2,3)",
        "image_size=(32,48)",
    ]
    config = load_config("segment:digits", [f"--config.{each}" for each in sizes])
    checkpoint.write(tmp_path / "stored", split(model)[1], make_metadata(config, NAMES))
    return tmp_path / "stored"


def test_weights_out_and_in_again(stored, model, tmp_path, capsys):
    """In Hugging Face's names, by the commands; the converted network is the same, ready to predict."""
    pytest.importorskip("transformers")
    out, converted = tmp_path / "out", tmp_path / "converted"
    assert main(["export", "--checkpoint", str(stored), "--format", "safetensors", "--out", str(out)]) == 0
    assert main(["convert", "--from", str(out / "model.safetensors"), "--to", str(converted)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["classes"], result["image_size"]) == (3, [32, 48])
    loaded, task = weights.load_task(converted)
    assert task.class_names == NAMES and task.config.task == "segment"
    assert (task.config.model.channels, task.config.model.pool_scales) == (12, (1, 2, 3))
    ours, theirs = split(loaded)[1], split(model)[1]
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_checkpoint_as_a_folder_of_its_own(stored, tmp_path):
    out = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(stored), "--format", "orbax", "--out", str(out)]) == 0
    ours, theirs = checkpoint.read_params(out), checkpoint.read_params(stored)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("bn.var") for name in ours)


def test_features_are_of_the_encoder(stored):
    model, _ = weights.load_task(stored)
    encoder = models.without_decoder(model)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    last = model.backbone.features(images)[-1].mean(axis=(1, 2))
    found = encoder(images)
    np.testing.assert_allclose(
        found, (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6), rtol=1e-4
    )


def test_preflights_description_is_enough_to_build_it():
    task = make_task(load_config("segment:atto"), "tpu", Described(class_names=NAMES))
    assert nnx.eval_shape(lambda: task.init(nnx.Rngs(0))).num_classes == 3
