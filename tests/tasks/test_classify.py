"""Classification: loss and scores against the formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from cnx2_jax.configuration import override
from cnx2_jax.data.mixing import draw_mix, mix_targets
from cnx2_jax.errors import UserError
from cnx2_jax.models.pixels import normalise
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, make_task
from cnx2_jax.tasks.base import Described
from cnx2_jax.train.terms import value


class Given(nnx.Module):
    """Any module that maps images to logits will do: this one has its logits in a parameter."""

    def __init__(self, logits):
        self.logits = nnx.Param(jnp.float32(logits))

    def __call__(self, images, keys=None):
        return self.logits[...]


def classify(*arguments):
    config = defaults("classify")
    use_digits(config)
    return make_task(override(config, [f"--config.{argument}" for argument in arguments]))


def batch_of(labels, **more):
    labels = np.int32(labels)
    return {"image": np.zeros((len(labels), 8, 8, 1), np.uint8), "label": labels, **more}


def log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_is_smoothed_cross_entropy(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((6, 10)), np.array([0, 9, 3, 3, 5, 1])
    # The true class gets 1 - s + s / K, every other s / K.
    targets = np.full((6, 10), smoothing / 10)
    targets[np.arange(6), labels] += 1 - smoothing
    expected = -(targets * log_softmax(logits)).sum(axis=1).mean()

    task = classify(f"label_smoothing={smoothing}")
    batch = task.prepare(batch_of(labels), jax.random.key(0))
    loss, metrics = task.loss(Given(logits), batch, jax.random.split(jax.random.key(0), 6))
    assert float(value(loss["loss"])) == pytest.approx(expected, rel=1e-5)
    assert float(value(metrics["accuracy"])) == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_balanced_weights_are_scikit_learns_and_divide_the_loss():
    task = classify("class_weights=balanced")
    labels = task.data.train.labels
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    np.testing.assert_allclose(task.class_weights(), expected)
    logits, few = np.random.default_rng(0).standard_normal((4, 10)), np.array([0, 8, 8, 3])
    loss, _ = task.loss(
        Given(logits),
        task.prepare(batch_of(few), jax.random.key(0)),
        jax.random.split(jax.random.key(0), 4),
    )
    each = -log_softmax(logits)[np.arange(4), few]
    average = (expected[few] * each).sum() / expected[few].sum()
    assert float(value(loss["loss"])) == pytest.approx(average, rel=1e-5)
    with pytest.raises(UserError, match="unknown class_weights 'balance'; did you mean 'balanced'"):
        classify("class_weights=balance")


def test_classes_come_from_a_table(tmp_path):
    names = [f"{index}.png" for index in range(8)]
    for name in names:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    rows = [f"{name},{'cat' if index < 6 else 'dog'}" for index, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    place = ["data.source=folder", f"data.root={tmp_path}", f"data.labels={tmp_path / 'labels.csv'}"]
    task = classify(*place, "data.val_fraction=0.5", "data.sampling=balanced", "batch_size=4", "image_size=8")
    assert task.class_names == ("cat", "dog")
    assert task.data.train.labels.tolist().count(1) == task.data.val.labels.tolist().count(1) == 1
    batches = task.data.train_batches(0)
    assert all(sorted(next(batches)["label"]) == [0, 0, 1, 1] for _ in range(3))
    with pytest.raises(UserError, match=r"unknown data\.sampling 'balance'; did you mean 'balanced'"):
        classify("data.sampling=balance")
    with pytest.raises(UserError, match=r"data\.classes 'x' names the classes in data\.labels; set that too"):
        classify("data.classes=x")


def test_evaluation_is_without_smoothing_and_without_padding():
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.standard_normal((40, 10)), rng.integers(0, 10, 40)
    mask = np.arange(40) < 33
    metrics = classify("label_smoothing=0.3").evaluate(Given(logits), [batch_of(labels, mask=mask)])
    order = np.argsort(-logits, axis=1)
    real = np.arange(33)
    assert metrics == {
        "accuracy": (order[:33, 0] == labels[:33]).mean(),
        "top5_accuracy": (order[:33, :5] == labels[:33, None]).any(axis=1).mean(),
        "loss": pytest.approx(-log_softmax(logits)[real, labels[:33]].mean(), rel=1e-5),
    }
    assert 0 < metrics["accuracy"] < metrics["top5_accuracy"] < 1


def test_ties_go_to_the_lower_index():
    mask = np.ones(10, bool)
    metrics = classify().evaluate(Given(np.zeros((10, 10))), [batch_of(np.arange(10), mask=mask)])
    # Of ten equal logits the first is the answer and the first five are the top five.
    assert metrics["accuracy"] == 1 / 10
    assert metrics["top5_accuracy"] == 5 / 10

    logits = np.zeros((10, 10))
    logits[:, 7] = 1
    logits[:, 9] = 1
    metrics = classify().evaluate(Given(logits), [batch_of(np.arange(10), mask=mask)])
    assert metrics["accuracy"] == 1 / 10  # 7
    assert metrics["top5_accuracy"] == 5 / 10  # 7, 9, 0, 1, 2


def test_a_logit_that_is_no_number_is_no_answer():
    logits = np.full((2, 10), np.nan)
    metrics = classify().evaluate(Given(logits), [batch_of([0, 3], mask=np.array([True, True]))])
    assert metrics["accuracy"] == metrics["top5_accuracy"] == 0
    assert np.isnan(metrics["loss"])


def test_metadata_carries_what_prediction_needs():
    task = classify("image_size=16")
    metadata = task.metadata()
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    assert metadata["config"]["model"]["dims"] == task.config.model.dims
    assert metadata["config"]["image_size"] == (16,)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range(smoothing):
    with pytest.raises(UserError, match=f"label_smoothing {smoothing}"):
        classify(f"label_smoothing={smoothing}")


@pytest.mark.parametrize("folders", [[""], ["only"]])
def test_one_class_or_none(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in "abcd":
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(UserError, match="at least two classes") as raised:
        classify("data.source=folder", f"data.root={tmp_path}")
    assert str(tmp_path) in str(raised.value)


def test_prepare_mixes_images_and_targets_by_one_draw():
    task = classify("mixup=0.8", "cutmix=1.0", "label_smoothing=0.1", "image_size=8")
    labels = np.int32([0, 9, 3, 5])
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    normal = normalise(jnp.asarray(images), task.config.data.mean, task.config.data.std)
    prepare, seen = jax.jit(task.prepare), set()
    for number in range(12):
        key = jax.random.key(number)
        batch = prepare({"image": images, "label": labels}, key)
        mix = draw_mix(key, (8, 8), 0.8, 1.0)
        expected = normal * mix.keep + normal[::-1] * (1 - mix.keep)
        np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
        np.testing.assert_allclose(batch["target"], mix_targets(labels, 10, mix, 0.1), atol=1e-6)
        np.testing.assert_array_equal(batch["label"], labels)
        seen.add(bool(np.isin(mix.keep, (0, 1)).all()))
    assert seen == {True, False}


def test_prepare_alone_changes_nothing():
    task, labels = classify(), np.int32([0, 9, 3])
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    batch = task.prepare({"image": images, "label": labels}, jax.random.key(0))
    expected = normalise(jnp.asarray(images), task.config.data.mean, task.config.data.std)
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
    np.testing.assert_array_equal(batch["target"], np.eye(10)[labels])


@pytest.mark.parametrize(
    ("target", "smoothing", "caption"),
    [([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3], 0.1, "dog"), ([0.3, 0.0, 0.7], 0.0, "ox 70%, cat 30%")],
)
def test_captions(target, smoothing, caption):
    config = defaults("classify")
    config.label_smoothing = smoothing
    task = make_task(config, data=Described(class_names=("cat", "dog", "ox")))
    images = np.zeros((1, 4, 4, 3), np.uint8)
    batch = {"image": images, "label": np.int32([1])}
    drawn, captions = task.sheet(batch, {"image": task.normalise(images), "target": jnp.float32([target])})
    assert captions == [caption] and (drawn == images).all()
