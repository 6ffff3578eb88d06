"""Means over padded batches equal a plain loop over the images."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from cnx2_jax.evaluation.metrics import average


class Linear(nnx.Module):
    def __init__(self, kernel):
        self.kernel = nnx.Param(jnp.asarray(kernel))


def score(model, batch, positions):
    logits = batch["image"] @ model.kernel[...]
    error = logits.max(axis=-1) - jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
    return {"accuracy": logits.argmax(axis=-1) == batch["label"], "loss": error, "position": positions}


def padded(images, labels, size):
    for start in range(0, len(images), size):
        real = len(images[start : start + size])
        places = np.minimum(start + np.arange(size), len(images) - 1)
        yield {"image": images[places], "label": labels[places], "mask": np.arange(size) < real}


@pytest.mark.parametrize("size", [1, 7, 64, 150, 1000])
def test_average_equals_a_loop(size):
    digits = load_digits()
    images, labels = digits.data[:150].astype(np.float32), digits.target[:150].astype(np.int32)
    # Whole numbers, so that logits are exact in any order of summation.
    kernel = np.random.default_rng(0).integers(-3, 4, (64, 10)).astype(np.float32)

    correct, error = 0, 0.0
    for image, label in zip(images, labels, strict=True):
        logits = image @ kernel
        correct += int(np.argmax(logits)) == label
        error += float(logits.max() - logits[label])

    metrics = average(score, Linear(kernel), padded(images, labels, size))
    assert metrics.keys() == {"accuracy", "loss", "position"}
    assert 0 < correct < 150
    assert metrics["accuracy"] == correct / 150
    assert metrics["loss"] == pytest.approx(error / 150, rel=1e-6)
    # The samples' places in the pass, which evaluation draws its masks from, are 0 to 149 in any batches.
    assert metrics["position"] == 149 / 2


def test_padding_may_hold_anything():
    images = np.float32([[1, 0], [np.nan, np.inf]])
    batch = {"image": images, "label": np.int32([0, 0]), "mask": np.array([True, False])}
    metrics = average(score, Linear(np.eye(2, dtype=np.float32)), [batch])
    assert metrics == {"accuracy": 1.0, "loss": 0.0, "position": 0.0}


def test_batches_of_padding_alone():
    real = {"image": np.float32([[1, 0]]), "label": np.int32([1]), "mask": np.array([True])}
    padding = {**real, "mask": np.array([False])}
    metrics = average(score, Linear(np.eye(2, dtype=np.float32)), [real, padding, padding])
    assert metrics == {"accuracy": 0.0, "loss": 1.0, "position": 0.0}
