"""Multi-label classification as a task: loss against NumPy, weights, threshold, a run from end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.tasks import make_task, weights
from cnx2_jax.tasks.base import Described
from cnx2_jax.train.terms import value

SMALL = [
    "model.depths=(1,1,1,1)",
    "model.dims=(4,4,8,8)",
    "image_size=(8,24)",
    "batch_size=8",
    "total_steps=4",
    "log_steps=1",
    "checkpoint_steps=3",
    "optimizer.warmup_epochs=0",
]


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


class Given(nnx.Module):
    """Any module that maps images to logits will do: this one has its logits in a parameter."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.float32(logits))

    def __call__(self, images, keys=None):
        return self.logits[...]


def config(*overrides):
    return load_config("multilabel:digits", [f"--config.{each}" for each in [*SMALL, *overrides]])


def described(*overrides, classes=("cat", "dog", "ox")):
    return make_task(config(*overrides), data=Described(class_names=classes))


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def literal(logits, targets, weights=1.0):
    yes, no = np.log(sigmoid(logits)), np.log(sigmoid(-logits))
    return -(weights * targets * yes + (1 - targets) * no)


def batch_of(targets, **more):
    return {"image": np.zeros((len(targets), 8, 24, 1), np.uint8), "labels": np.float32(targets), **more}


def prepared(task, targets):
    return task.prepare(batch_of(targets), jax.random.key(1))


@pytest.mark.parametrize("mixed", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_alike(mixed):
    task = described(f"{mixed}=0.8", "label_smoothing=0.2")
    # White images have all labels, black ones none, so an image's mean tells its share of labels.
    white, black = ((value - 0.3) / 0.35 for value in (1, 0))
    batch = {**batch_of([[1] * 3, [0] * 3]), "image": np.zeros((2, 8, 24, 1), np.uint8)}
    batch["image"][0] = 255
    found = jax.jit(task.prepare)(batch, jax.random.key(5))
    shares = (np.asarray(found["image"]).mean(axis=(1, 2, 3)) - black) / (white - black)
    assert 0.01 < shares[0] < 0.99 and shares.sum() == pytest.approx(1, abs=1e-5)
    targets = np.repeat(shares[:, None] * 0.8 + 0.1, 3, axis=1)
    np.testing.assert_allclose(found["target"], targets, atol=1e-5)
    drawn, captions = task.sheet(batch, found)
    assert captions[0] == ", ".join(f"{name} {shares[0]:.0%}" for name in task.class_names)
    if mixed == "mixup":
        np.testing.assert_allclose(drawn[0], 255 * shares[0], atol=0.51)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_mean_over_images_and_classes(smoothing):
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.standard_normal((5, 3)), rng.integers(0, 2, (5, 3))
    task = described(f"label_smoothing={smoothing}")
    loss, _ = task.loss(Given(logits), prepared(task, targets), jax.random.split(jax.random.key(0), 5))
    expected = literal(logits, targets * (1 - smoothing) + smoothing / 2).mean()
    assert float(value(loss["loss"])) == pytest.approx(expected, rel=1e-5)


def write_images(folder, rows, header="image,labels"):
    """Images a.png, b.png ... and a table with these rows."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{chr(97 + index)}.png" for index in range(len(rows))]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 24), np.uint8)).save(folder / name)
    lines = [header, *(f"{name},{row}" for name, row in zip(names, rows, strict=True))]
    (folder / "labels.csv").write_text("\n".join(lines))
    return ["data.source=folder", f"data.root={folder}", f"data.labels={folder / 'labels.csv'}"]


def test_positives_weigh_as_much_as_negatives_of_their_class(tmp_path):
    rows = ["dog,train"] * 6 + ["dog;cat,train"] * 2 + ["cat;ox,val"]
    keys = write_images(tmp_path, rows, "image,labels,split")
    task = make_task(config(*keys, "positive_weights=balanced"))
    # cat: 2 of 8 images; dog: all of them; ox: none, so the bound holds.
    np.testing.assert_allclose(task.positive_weights(), [3, 0, 20])
    logits, targets = np.random.default_rng(0).standard_normal((2, 3)), np.array([[1, 0, 1], [0, 1, 0]])
    loss, _ = task.loss(Given(logits), prepared(task, targets), jax.random.split(jax.random.key(0), 2))
    expected = literal(logits, targets, np.array([3, 0, 20])).mean()
    assert float(value(loss["loss"])) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(make_task(config(*keys)).positive_weights(), [1, 1, 1])


def test_evaluation_is_without_weights_and_padding_and_keeps_the_threshold():
    rng = np.random.default_rng(1)
    logits, targets = 3 * rng.standard_normal((12, 3)), rng.integers(0, 2, (12, 3))
    task = described("label_smoothing=0.3")
    assert task.metadata()["threshold"] == 0.5
    found = task.evaluate(Given(logits), [batch_of(targets, mask=np.arange(12) < 9)])
    assert found.keys() == {"loss", "map", "f1", "threshold"}
    assert found["loss"] == pytest.approx(literal(logits[:9], targets[:9]).mean(), rel=1e-5)
    assert task.metadata()["threshold"] == found["threshold"]
    other = described()
    other.adopt(task.metadata())
    assert other.threshold == found["threshold"]


def test_a_prediction_names_all_classes_that_reach_the_threshold():
    task = described()
    task.threshold = 0.3
    found = task.prediction({"probability": np.float32([0.4, 0.1, 0.9])}, top=1)
    assert found["threshold"] == 0.3
    assert [(each["class"], each["predicted"]) for each in found["predictions"]] == [
        ("ox", True),
        ("cat", True),
    ]
    assert task.prediction_lines(found) == ["  ox   90.00%  yes", "  cat  40.00%  yes"]
    found = task.prediction({"probability": np.float32([0.2, 0.1, 0.25])}, top=2)
    assert task.prediction_lines(found) == ["  ox   25.00%", "  cat  20.00%"]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="unknown positive_weights 'balance'; did you mean 'balanced'"):
        described("positive_weights=balance")
    with pytest.raises(
        UserError, match=r"data\.source 'digits' has nothing to learn for this task; set data"
    ):
        make_task(config("data.source=digits"))
    with pytest.raises(
        UserError, match=r"data\.val_source 'digits': validation images with 'labels' come from"
    ):
        make_task(config("data.val_source=digits"))
    keys = write_images(tmp_path, ["x,train", ",val"], "image,labels,split")
    with pytest.raises(UserError, match="none of the 1 validation images has a label"):
        make_task(config(*keys))


def test_train_evaluate_predict_export(tmp_path, capfd):
    rows = ["dog", "", "dog;cat", "cat"] * 6
    keys = write_images(tmp_path / "images", rows)
    run = str(tmp_path / "run")
    settings = [f"--config.{each}" for each in [*SMALL, *keys, "ema_decay=0.5"]]
    assert main(["train", "--config", "multilabel:digits", "--workdir", run, *settings]) == 0
    result = json.loads(capfd.readouterr().out)
    assert {"map", "f1", "threshold", "ema_map", "ema_threshold"} <= result.keys()
    metadata = checkpoint.read_metadata(checkpoint.find(tmp_path / "run"))
    assert metadata["threshold"] == result["ema_threshold"]
    assert metadata["class_names"] == ["cat", "dog"]
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in logged if row["split"] == "train")

    report = tmp_path / "report"
    assert main(["evaluate", "--workdir", run, "--report", str(report)]) == 0
    lines = (report / "classes.csv").read_text().splitlines()
    assert lines[0] == "class,average_precision,f1,precision,recall,support"
    aps = [float(line.split(",")[1]) for line in lines[1:] if line.split(",")[1]]
    assert np.mean(aps) == pytest.approx(result["ema_map"], abs=1e-4)
    evaluated = json.loads(capfd.readouterr().out)
    assert evaluated["ema_map"] == result["ema_map"]
    image = str(tmp_path / "images" / "c.png")
    assert main(["predict", "--checkpoint", run, "--json", image]) == 0
    predicted = json.loads(capfd.readouterr().out)
    assert predicted["threshold"] == result["ema_threshold"]
    model, task = weights.load_task(tmp_path / "run")
    pixels = np.asarray(Image.open(image))[None, :, :, None]
    expected = sigmoid(np.asarray(jax.jit(lambda x: model(x))(task.normalise(pixels))))[0]
    shares = {each["class"]: each["probability"] for each in predicted["predictions"]}
    np.testing.assert_allclose([shares["cat"], shares["dog"]], expected, rtol=1e-4)
    out = str(tmp_path / "model.stablehlo")
    assert main(["export", "--checkpoint", run, "--format", "stablehlo", "--out", out]) == 0
    assert main(["evaluate", "--workdir", run, "--knn", "3"]) == 2
    assert "--knn: images have no single class in task 'multilabel'" in capfd.readouterr().err
