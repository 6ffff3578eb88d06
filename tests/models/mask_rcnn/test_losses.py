"""The losses against sums over boxes, and of nothing at all; tests/parity compares those of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models.mask_rcnn.heads import BoxOutputs
from cnx2_jax.models.mask_rcnn.losses import binary_cross_entropy, box_losses, mask_losses, rpn_losses
from cnx2_jax.models.mask_rcnn.rpn import RPNOutputs
from cnx2_jax.models.mask_rcnn.targets import RoITargets, RPNTargets

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_cross_entropy_does_not_overflow():
    logits = jnp.asarray([-1000.0, -1.0, 0.0, 3.0, 1000.0])
    np.testing.assert_allclose(
        binary_cross_entropy(logits, jnp.ones(5)), [1000, 1.3132617, 0.6931472, 0.0485874, 0], rtol=1e-5
    )
    assert np.isfinite(jax.grad(lambda x: binary_cross_entropy(x, jnp.zeros(5)).sum())(logits)).all()


def test_anchors():
    rng = np.random.default_rng(0)
    logits, deltas = rng.normal(size=(2, 9)), rng.normal(size=(2, 9, 4))
    index = np.array([[3, 1, 8, 0], [5, 0, 0, 0]])
    positive = np.array([[True, True, False, False], [False] * 4])
    valid = np.array([[True, True, True, False], [True, False, False, False]])
    targets = rng.normal(size=(2, 4, 4))
    outputs = RPNOutputs(*map(jnp.float32, (logits, deltas)))
    found = rpn_losses(outputs, RPNTargets(*map(jnp.asarray, (index, positive, valid, np.float32(targets)))))
    classes = [np.log1p(np.exp(-logits[0, i])) for i in (3, 1)]
    classes += [np.log1p(np.exp(logits[at])) for at in ((0, 8), (1, 5))]
    boxes = [np.abs(deltas[0, i] - targets[0, place]).sum() for place, i in enumerate((3, 1))]
    for name, expected in (("rpn_class_loss", sum(classes)), ("rpn_box_loss", sum(boxes))):
        np.testing.assert_allclose(found[name], (expected, 4), rtol=1e-5)


def test_regions():
    """Deltas of the object's class alone; the background has none."""
    rng = np.random.default_rng(1)
    logits, deltas, targets = (
        rng.normal(size=(1, 4, 4)),
        rng.normal(size=(1, 4, 3, 4)),
        rng.normal(size=(1, 4, 4)),
    )
    classes = np.array([[2, 0, 3, 3]])
    positive, valid = np.array([[True, True, False, False]]), np.array([[True, True, True, False]])
    nothing = np.zeros((1, 4, 4), np.float32)
    drawn = (nothing, valid, positive, classes, np.float32(targets), np.zeros((1, 4), int))
    outputs = BoxOutputs(*map(jnp.float32, (logits, deltas)))
    found = box_losses(outputs, RoITargets(*map(jnp.asarray, drawn)))
    shares = np.exp(logits[0]) / np.exp(logits[0]).sum(axis=1, keepdims=True)
    expected = -np.log([shares[0, 2], shares[1, 0], shares[2, 3]]).sum()
    np.testing.assert_allclose(found["class_loss"], (expected, 3), rtol=1e-5)
    expected = np.abs(deltas[0, 0, 2] - targets[0, 0]).sum() + np.abs(deltas[0, 1, 0] - targets[0, 1]).sum()
    np.testing.assert_allclose(found["box_loss"], (expected, 3), rtol=1e-5)


@pytest.mark.parametrize("positive", [(True, False), (False, False)])
def test_masks(positive):
    """Averaged over the pixels of positive regions; without any, sum, weight and gradient are 0."""
    rng = np.random.default_rng(2)
    logits, masks = rng.normal(size=(1, 2, 3, 3)), rng.integers(0, 2, (1, 2, 3, 3))

    def run(logits):
        return mask_losses(logits, jnp.float32(masks), jnp.asarray([positive]))["mask_loss"]

    shares = 1 / (1 + np.exp(-logits[0, 0]))
    expected = -np.log(np.where(masks[0, 0], shares, 1 - shares)).sum() if positive[0] else 0
    np.testing.assert_allclose(run(jnp.float32(logits)), (expected, 9 if positive[0] else 0), rtol=1e-5)
    gradient = np.asarray(jax.grad(lambda x: run(x)[0])(jnp.float32(logits)))[0]
    assert gradient[0].any() == positive[0] and not gradient[1].any()
