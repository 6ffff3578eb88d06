"""Means over padded batches equal a plain loop over the images."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from cnx2_jax.evaluation.metrics import ConfusionMatrix, Mean, Records, evaluate


class Linear(nnx.Module):
    def __init__(self, kernel):
        self.kernel = nnx.Param(jnp.asarray(kernel))


class Scorer:
    def score(self, model, batch, positions):
        logits = batch["image"] @ model.kernel[...]
        error = logits.max(axis=-1) - jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        return {"accuracy": logits.argmax(axis=-1) == batch["label"], "loss": error, "position": positions}

    def metrics(self):
        return (Mean(),)


def padded(images, labels, size):
    for start in range(0, len(images), size):
        real = len(images[start : start + size])
        places = np.minimum(start + np.arange(size), len(images) - 1)
        yield {"image": images[places], "label": labels[places], "mask": np.arange(size) < real}


@pytest.mark.parametrize("size", [1, 7, 64, 150, 1000])
def test_means_equal_a_loop(size):
    digits = load_digits()
    images, labels = digits.data[:150].astype(np.float32), digits.target[:150].astype(np.int32)
    # Whole numbers, so that logits are exact in any order of summation.
    kernel = np.random.default_rng(0).integers(-3, 4, (64, 10)).astype(np.float32)

    correct, error = 0, 0.0
    for image, label in zip(images, labels, strict=True):
        logits = image @ kernel
        correct += int(np.argmax(logits)) == label
        error += float(logits.max() - logits[label])

    metrics = evaluate(Scorer(), Linear(kernel), padded(images, labels, size))
    assert metrics.keys() == {"accuracy", "loss", "position"}
    assert 0 < correct < 150
    assert metrics["accuracy"] == correct / 150
    assert metrics["loss"] == pytest.approx(error / 150, rel=1e-6)
    # The samples' places in the pass, which evaluation draws its masks from, are 0 to 149 in any batches.
    assert metrics["position"] == 149 / 2


def test_padding_may_hold_anything():
    images = np.float32([[1, 0], [np.nan, np.inf]])
    batch = {"image": images, "label": np.int32([0, 0]), "mask": np.array([True, False])}
    metrics = evaluate(Scorer(), Linear(np.eye(2, dtype=np.float32)), [batch])
    assert metrics == {"accuracy": 1.0, "loss": 0.0, "position": 0.0}


def test_batches_of_padding_alone():
    real = {"image": np.float32([[1, 0]]), "label": np.int32([1]), "mask": np.array([True])}
    padding = {**real, "mask": np.array([False])}
    metrics = evaluate(Scorer(), Linear(np.eye(2, dtype=np.float32)), [real, padding, padding])
    assert metrics == {"accuracy": 0.0, "loss": 1.0, "position": 0.0}


class Pixels:
    """Scores pixels that a batch brings, by a confusion matrix."""

    def score(self, model, batch, positions):
        return {"target": batch["target"], "predicted": batch["predicted"]}

    def metrics(self):
        return (ConfusionMatrix(4),)


def literal(target, predicted, num_classes):
    """Intersection over union, accuracy by class and overall, pixel by pixel."""
    ious, accuracies, right, count = [], [], 0, 0
    for label in range(num_classes):
        inside = (target >= 0) & (target < num_classes)
        is_true, is_predicted = (target == label) & inside, (predicted == label) & inside
        union = (is_true | is_predicted).sum()
        if union:
            ious.append((is_true & is_predicted).sum() / union)
        if is_true.sum():
            accuracies.append((is_true & is_predicted).sum() / is_true.sum())
        right, count = right + (is_true & is_predicted).sum(), count + is_true.sum()
    return {"miou": np.mean(ious), "mean_accuracy": np.mean(accuracies), "pixel_accuracy": right / count}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_confusion_matrix_equals_a_loop(size):
    rng = np.random.default_rng(0)
    # Class 3 does not occur, neither as a target nor predicted; 255 is to be ignored.
    target = rng.choice([0, 1, 2, 255], (7, 5, 6)).astype(np.int32)
    predicted = np.where(
        rng.random(target.shape) < 0.6, np.minimum(target, 2), rng.integers(0, 3, target.shape)
    )
    batches = []
    for start in range(0, 7, size):
        places = np.minimum(start + np.arange(size), 6)
        mask = start + np.arange(size) < 7
        batches.append({"target": target[places], "predicted": predicted[places], "mask": mask})
    metrics = evaluate(Pixels(), Linear(np.zeros((1, 1))), batches)
    assert metrics == literal(target, predicted, 4)


def test_a_confusion_matrix_loses_no_pixel_of_many():
    metric, counts = ConfusionMatrix(2), np.array([[2**31 - 2, 0], [1, 0]], np.int32)
    total = metric.empty()
    for _ in range(3000):
        total = metric.add(total, counts, {})
    assert total.tolist() == [[3000 * (2**31 - 2), 0], [3000, 0]]  # float32 would lose the ones


class Largest(Records):
    def result(self, total):
        last = total["id"][total["value"].argmax()].decode()
        return {"largest": float(total["value"].max()), "samples": len(total["value"]), "of": last}


class Values:
    def score(self, model, batch, positions):
        return {"value": batch["value"], "position": positions}

    def metrics(self):
        return (Largest("value", host=("id",)), Mean())


def test_records_hold_every_sample_once():
    batches = [
        {
            "value": np.float32([1, 5, 2]),
            "mask": np.array([True, True, True]),
            "host": {"id": np.array([b"a", b"bb", b"c"], object)},
        },
        {
            "value": np.float32([4, 9, 9]),
            "mask": np.array([True, False, False]),
            "host": {"id": np.array([b"ddd", b"ddd", b"ddd"], object)},
        },
    ]
    metrics = evaluate(Values(), Linear(np.zeros((1, 1))), batches)
    assert metrics == {"largest": 5.0, "samples": 4, "of": "bb", "value": 3.0, "position": 1.5}
