"""`cnx2 convert`: other libraries' files become checkpoints that every command takes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from cnx2_jax.cli import main
from cnx2_jax.configuration import image_hw
from cnx2_jax.data.imagenet import CLASS_IDS, describe
from cnx2_jax.interop.names import to_torch
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig
from cnx2_jax.models.state import split
from cnx2_jax.tasks import defaults, weights

SMALL = ((1, 2, 1, 1), (8, 16, 24, 40))


@pytest.fixture(scope="module")
def classifier(build):
    return build(ConvNeXtV2, EncoderConfig(*SMALL), num_classes=3)


def save(path, model, naming="official", without=()):
    """Writes a model's state dict in a naming, without some names, and returns the path."""
    params = {name: np.asarray(value) for name, value in split(model)[1].items()}
    tensors = to_torch(params, naming)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({n: v for n, v in tensors.items() if n not in without}, path)
    return path


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def refusal(capfd, *arguments):
    assert convert(*arguments) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("naming", ["official", "timm", "huggingface"])
def test_the_same_model_comes_out(tmp_path, capfd, classifier, naming):
    path = save(tmp_path / "model.safetensors", classifier, naming)
    assert convert("--from", path, "--to", tmp_path / "new", "--image-size", 96) == 0
    params = split(classifier)[1]
    assert json.loads(capfd.readouterr().out) == {
        "out": str(tmp_path / "new"),
        "variant": "custom",
        "classes": 3,
        "parameters": sum(value.size for value in params.values()),
        "naming": naming,
        "image_size": [96, 96],
    }
    model, config, names = weights.load(tmp_path / "new")
    assert names == ("class_0000", "class_0001", "class_0002") and image_hw(config) == (96, 96)
    found = split(model)[1]
    assert found.keys() == params.keys()
    assert all(np.array_equal(found[name], params[name]) for name in params)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3)), jnp.float32)
    np.testing.assert_allclose(model(images), classifier(images), rtol=1e-5, atol=1e-5)


def test_predict_names_the_classes_of_a_file(tmp_path, capfd, classifier):
    path = save(tmp_path / "model.safetensors", classifier)
    (tmp_path / "names.txt").write_text("cat\ndog\nnewt\n")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(picture)
    names = ("--class-names", tmp_path / "names.txt", "--image-size", 32)
    assert convert("--from", path, "--to", tmp_path / "new", *names) == 0
    capfd.readouterr()
    assert main(["predict", "--checkpoint", str(tmp_path / "new"), str(picture)]) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("cat", "dog", "newt"))


def test_what_lies_beside_the_weights_is_read(tmp_path, classifier):
    path = save(tmp_path / "model.safetensors", classifier, "huggingface")
    labels = {"0": "a", "1": "b", "2": "c"}
    config = {"model_type": "convnextv2", "id2label": labels, "image_size": 224}
    processor = {"size": {"shortest_edge": 64}, "crop_pct": 0.9}
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert convert("--from", path, "--to", tmp_path / "new") == 0
    _, config, names = weights.load(tmp_path / "new")
    assert names == ("a", "b", "c") and image_hw(config) == (64, 64) and config.data.eval_crop == 0.9
    assert (config.data.mean, config.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_thousand_classes_are_those_of_imagenet(tmp_path, build):
    path = save(tmp_path / "model.safetensors", build(ConvNeXtV2, EncoderConfig(*SMALL), num_classes=1000))
    assert convert("--from", path, "--to", tmp_path / "new") == 0
    assert weights.load(tmp_path / "new")[2] == CLASS_IDS


def test_fine_tuning_starts_from_a_pretrained_encoder(tmp_path, capfd, build):
    """The authors' encoders have no head and no final norm, so both start fresh."""
    encoder = build(ConvNeXtV2, EncoderConfig(*SMALL), num_classes=0)
    missing = ("norm.weight", "norm.bias")
    path = save(tmp_path / "model.safetensors", encoder, without=missing)
    assert convert("--from", path, "--to", tmp_path / "new") == 0
    assert json.loads(capfd.readouterr().out)["classes"] == 0
    config = defaults("classify")
    config.model.variant, config.model.depths, config.model.dims = "custom", *SMALL
    fresh = split(build(ConvNeXtV2, EncoderConfig(*SMALL), num_classes=5, seed=1))[1]
    started = weights.starting_params(tmp_path / "new", config, fresh)
    given = split(encoder)[1]
    for name, value in started.items():
        if name.startswith("head."):
            expected = fresh[name]
        elif name.startswith("norm."):
            expected = np.full(40, name.endswith("scale"), np.float32)
        else:
            expected = given[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)

    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(picture)
    assert main(["predict", "--checkpoint", str(tmp_path / "new"), str(picture)]) == 2
    assert "fine-tune it first" in capfd.readouterr().err


def test_a_whole_fcmae_becomes_a_pretraining_checkpoint(tmp_path, build):
    fcmae = build(FCMAE, EncoderConfig(*SMALL), decoder_dim=12, decoder_depth=2)
    path = save(tmp_path / "model.safetensors", fcmae)
    assert convert("--from", path, "--to", tmp_path / "new") == 0
    model, config, _ = weights.load(tmp_path / "new")
    assert isinstance(model, FCMAE)
    assert (config.task, config.model.decoder_dim, config.model.decoder_depth) == ("pretrain", 12, 2)
    found, params = split(model)[1], split(fcmae)[1]
    assert all(np.array_equal(found[name], params[name]) for name in params)


def test_refusals_write_nothing(tmp_path, capfd, classifier, build):
    path, out = save(tmp_path / "model.safetensors", classifier), tmp_path / "new"
    place = ("--from", path, "--to", out)
    assert "50x50 is not a multiple" in refusal(capfd, *place, "--image-size", 50)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert "holds 2 class names, the weights have 3" in refusal(
        capfd, *place, "--class-names", tmp_path / "names.txt"
    )
    assert "absent.txt" in refusal(capfd, *place, "--class-names", tmp_path / "absent.txt")
    grey = save(
        tmp_path / "grey" / "model.safetensors",
        build(ConvNeXtV2, EncoderConfig(*SMALL, in_chans=1), num_classes=3),
    )
    assert "mean and standard deviation are unknown" in refusal(capfd, "--from", grey, "--to", out)
    assert "No such file" in refusal(capfd, "--from", tmp_path / "no.pt", "--to", out)
    assert not out.exists()
    out.mkdir()
    assert "choose another --to" in refusal(capfd, *place)
    assert not list(out.iterdir())


def test_classes_of_the_hub_are_recognised_as_imagenets(tmp_path, build, capfd):
    path = save(
        tmp_path / "model.safetensors",
        build(ConvNeXtV2, EncoderConfig(*SMALL), num_classes=1000),
        "huggingface",
    )
    labels = {str(index): f"{describe(name)}, another word" for index, name in enumerate(CLASS_IDS)}
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"model_type": "convnextv2", "id2label": labels}))
    assert convert("--from", path, "--to", tmp_path / "new") == 0
    assert weights.load(tmp_path / "new")[2] == CLASS_IDS
    labels = {key: f"{key} {name}" for key, name in labels.items()}  # other classes
    beside.write_text(json.dumps({"model_type": "convnextv2", "id2label": labels}))
    assert convert("--from", path, "--to", tmp_path / "other") == 0
    assert weights.load(tmp_path / "other")[2] == tuple(labels.values())


def test_what_cannot_be_right_is_refused(tmp_path, capfd, classifier):
    path, out = save(tmp_path / "model.safetensors", classifier, "huggingface"), tmp_path / "new"
    (tmp_path / "names.txt").write_text("cat\ndog\ncat\n")
    (tmp_path / "none.txt").write_text("")
    place = ("--from", path, "--to", out)
    assert "the class name 'cat' twice" in refusal(capfd, *place, "--class-names", tmp_path / "names.txt")
    assert "holds no class names, the weights have 3" in refusal(
        capfd, *place, "--class-names", tmp_path / "none.txt"
    )
    other = {"model_type": "convnextv2", "depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert "describes a model with depths [3, 3, 9, 3]" in refusal(capfd, *place)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnextv2_tiny"}))
    assert "describes 'tiny', the weights beside it have other sizes" in refusal(capfd, *place)
    (tmp_path / "config.json").unlink()
    tensors = safetensors.numpy.load_file(path)
    name = next(iter(tensors))
    for wrong in (np.full_like(tensors[name], np.nan), tensors[name].astype(np.int32)):
        safetensors.numpy.save_file({**tensors, name: wrong}, path)
        assert "holds no float32 weights" in refusal(capfd, *place)
    assert not out.exists()
    assert main(["predict", "--checkpoint", str(path), str(path)]) == 2
    assert "run `cnx2 convert` to make a checkpoint" in capfd.readouterr().err
