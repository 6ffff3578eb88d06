"""ImageNet's other sets: which classes are scored, where images are found, the mean corruption error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.data import sources
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import robustness
from cnx2_jax.evaluation.robustness import ALEXNET_ERRORS, corruption_errors, evaluate_set
from cnx2_jax.tasks import defaults
from cnx2_jax.train import sharding

CLASSES = ("n00", "n01", "n02", "n03", "n04")


class Brightness(nnx.Module):
    """Prefers class 3 to all others; among the others, predicts class k for grey `50 * k`."""

    def __init__(self):
        self.bias = nnx.Param(jnp.array([0.0, 0.0, 0.0, 300.0, 0.0]))  # class 3 always wins, where it may

    def __call__(self, images, keys=None):
        grey = images.mean(axis=(1, 2, 3))
        return -jnp.abs(grey[:, None] - jnp.arange(5) * 50) + self.bias[...]


@pytest.fixture
def config():
    values = defaults("classify")
    values.update({"batch_size": 4, "image_size": (8, 8)})
    values.data.update({"mean": (0.0,) * 3, "std": (1 / 255,) * 3})
    return values


@pytest.fixture
def mesh(config):
    return sharding.make_mesh(config.mesh)


def save(root, name, *greys, size=(8, 8)):
    for index, grey in enumerate(greys):
        path = root / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (grey,) * 3).save(path)


def evaluate(config, mesh, name, location):
    return evaluate_set(Brightness(), config, CLASSES, name, str(location), mesh)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_sets_of_some_classes_are_scored_over_those_only(config, mesh, tmp_path, name):
    save(tmp_path, "n01", 50, 60)
    save(tmp_path, "n04", 200, 40, 195)  # of which one is like class 1
    metrics = evaluate(config, mesh, name, tmp_path)
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["top5_accuracy"] == 1
    logits = np.array([[0.0, -150], [-10, -140], [-150, 0], [-10, -160], [-145, -5]])
    labels = np.array([0, 0, 1, 1, 1])
    expected = -np.mean(
        [
            np.log(np.exp(row - row.max()) / np.exp(row - row.max()).sum())[k]
            for row, k in zip(logits, labels, strict=True)
        ]
    )
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["imagenet-sketch", "imagenet-v2"])
def test_other_sets_are_scored_over_all_classes(config, mesh, tmp_path, name):
    folders = ("n01", "n03") if name == "imagenet-sketch" else ("1", "3")
    save(tmp_path, folders[0], 50, 60, 55)
    save(tmp_path, folders[1], 1)
    # Class 3 is preferred to all: that is wrong for three and right for one.
    assert evaluate(config, mesh, name, tmp_path)["accuracy"] == 1 / 4


def corrupted(root, error_of, groups=False):
    """Writes twenty images of each corruption and severity, `error_of` of them misclassified."""
    for number, corruption in enumerate(ALEXNET_ERRORS):
        top = root / f"group{number % 4}" / corruption if groups else root / corruption
        for severity in range(1, 6):
            wrong = error_of(number, severity)
            save(top / str(severity), "n03", *[150] * (20 - wrong))
            save(top / str(severity), "n00", *[0] * wrong)  # taken for class 3


@pytest.mark.parametrize("groups", [False, True])
def test_mean_corruption_error(config, mesh, tmp_path, groups, monkeypatch):
    # Three corruptions are enough to tell means over severities, corruptions and all images apart.
    chosen = {name: ALEXNET_ERRORS[name] for name in ("gaussian_noise", "brightness", "pixelate")}
    monkeypatch.setattr(robustness, "ALEXNET_ERRORS", chosen)
    monkeypatch.setitem(globals(), "ALEXNET_ERRORS", chosen)
    config.batch_size = 32
    corrupted(tmp_path, lambda number, severity: (number + 1) * severity, groups)
    metrics = evaluate(config, mesh, "imagenet-c", tmp_path)
    errors = {name: np.mean([(i + 1) * s / 20 for s in range(1, 6)]) for i, name in enumerate(chosen)}
    for name, error in errors.items():
        assert metrics[f"ce_{name}"] == pytest.approx(error / chosen[name])
    assert metrics["mce"] == pytest.approx(np.mean([errors[name] / chosen[name] for name in chosen]))
    assert metrics["accuracy"] == pytest.approx(1 - np.mean(list(errors.values())))


def test_alexnet_itself_has_a_mean_corruption_error_of_one():
    metrics = corruption_errors(
        lambda corruption, severity: {"accuracy": 1 - ALEXNET_ERRORS[corruption] + 0.05 * (severity - 3)}
    )
    assert metrics["mce"] == pytest.approx(1)
    assert len(ALEXNET_ERRORS) == 15
    assert np.mean(list(ALEXNET_ERRORS.values())) == pytest.approx(0.788, abs=1e-3)  # as published: 78.8%


def test_images_of_imagenet_c_are_not_cropped(config, mesh, tmp_path, monkeypatch):
    seen = []

    def scored(model, config, *_):
        seen.append(config)
        return {"accuracy": 0.5}

    monkeypatch.setattr(robustness, "_evaluate", scored)
    corrupted(tmp_path, lambda number, severity: 1)
    evaluate(config, mesh, "imagenet-c", tmp_path)
    assert len(seen) == 75 and {each.data.eval_crop for each in seen} == {1.0}
    assert config.data.eval_crop == 0.875  # the caller's stays as it is


def test_tfds_names(config, mesh, monkeypatch):
    seen = []
    monkeypatch.setattr(sources, "open_set", lambda *place: seen.append(place[:2]))
    monkeypatch.setattr(robustness, "_evaluate", lambda *_: {"accuracy": 0.5})
    evaluate(config, mesh, "imagenet-v2", "tfds")
    evaluate(config, mesh, "imagenet-a", "tfds:/data")
    evaluate(config, mesh, "imagenet-c", "tfds:/data")
    assert seen[:2] == [("tfds:imagenet_v2/matched-frequency:test", ""), ("tfds:imagenet_a:test", "/data")]
    assert ("tfds:imagenet2012_corrupted/snow_4:validation", "/data") in seen and len(seen) == 77


def test_user_errors(config, mesh, tmp_path):
    with pytest.raises(UserError, match="unknown set 'imagenet-b'; did you mean 'imagenet-"):
        evaluate(config, mesh, "imagenet-b", tmp_path)
    with pytest.raises(UserError, match="has no folder gaussian_noise/1: it is not ImageNet-C"):
        evaluate(config, mesh, "imagenet-c", tmp_path)
    save(tmp_path, "n77", 1)
    with pytest.raises(UserError, match="a class 'n77' that the model was not trained on"):
        evaluate(config, mesh, "imagenet-a", tmp_path)
    assert jax.device_count() >= 1
