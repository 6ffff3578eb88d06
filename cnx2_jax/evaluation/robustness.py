"""Evaluates on ImageNet-A, -R, -Sketch, -V2 and -C: accuracy on images unlike the training images."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cnx2_jax.cluster import processes
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation.classification import evaluate
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.train import sharding
from cnx2_jax.types import Metrics

if TYPE_CHECKING:  # data needs TensorFlow, so it is imported only when a set is opened
    from cnx2_jax.data.sources import Source

# Top-1 errors of AlexNet, averaged over the five severities. ImageNet-C's errors are divided by them
# (Hendrycks & Dietterich 2019; the authors' repository hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = range(1, 6)

# The names of the sets in TFDS, which has one of ImageNet-C for each corruption and severity.
SETS = {
    "imagenet-a": "imagenet_a:test",
    "imagenet-r": "imagenet_r:test",
    "imagenet-sketch": "imagenet_sketch:test",
    "imagenet-v2": "imagenet_v2/matched-frequency:test",
    "imagenet-c": "imagenet2012_corrupted/{corruption}_{severity}:validation",
}
# Sets with images of only 200 of the 1,000 classes. Only the logits of these classes are compared.
PRESENT_CLASSES_ONLY = ("imagenet-a", "imagenet-r")


def check(name: str) -> None:
    """Raises UserError unless `name` is one of SETS."""
    if name not in SETS:
        raise UserError(f"unknown set '{name}'{nearest(name, SETS)} (known: {', '.join(SETS)})")


def evaluate_set(
    model: ConvNeXtV2, config: ConfigDict, class_names: Sequence[str], name: str, location: str, mesh: Mesh
) -> Metrics:
    """Evaluates a classifier on one of ImageNet's other validation sets.

    Args:
      model: the classifier.
      config: the config of its run.
      class_names: the classes of its outputs, named as the set's folders: WordNet ids.
      name: one of SETS.
      location: the set's folder as published, or "tfds" or "tfds:DATA_DIR".
      mesh: where the model lives.

    Returns:
      `accuracy`, `top5_accuracy` and `loss`; for ImageNet-C their means over all corruptions and
      severities, `mce`, and each corruption's error relative to AlexNet's as `ce_NAME`.

    Raises:
      UserError: the set is unknown, images are missing, or their classes are not the model's.
    """
    from cnx2_jax.data.sources import open_set

    check(name)
    config = config.copy_and_resolve_references()
    config.unlock()

    def scored(place: tuple[str, str]) -> Metrics:
        source = open_set(*place, class_names, config.data)
        return _evaluate(model, config, source, name in PRESENT_CLASSES_ONLY, mesh)

    if name != "imagenet-c":
        return scored(_place(location, SETS[name]))
    config.data.eval_crop = 1.0  # the published images are already cropped
    return corruption_errors(lambda corruption, severity: scored(_corrupted(location, corruption, severity)))


def corruption_errors(scored: Callable[[str, int], Metrics]) -> Metrics:
    """Evaluates all corruptions at all severities and returns metrics with `mce`, their mean error.

    The error of a corruption is averaged over severities and divided by AlexNet's. `mce` is the mean of these
    quotients over corruptions (Hendrycks & Dietterich 2019, section 4.1).

    Args:
      scored: returns the metrics for a corruption and a severity.
    """
    rows = {
        corruption: [scored(corruption, severity) for severity in SEVERITIES] for corruption in ALEXNET_ERRORS
    }
    metrics = {
        key: float(np.mean([[row[key] for row in rows_of_one] for rows_of_one in rows.values()]))
        for key in rows["gaussian_noise"][0]
    }
    relative = {
        corruption: float(np.mean([1 - row["accuracy"] for row in rows_of_one])) / ALEXNET_ERRORS[corruption]
        for corruption, rows_of_one in rows.items()
    }
    metrics["mce"] = float(np.mean(list(relative.values())))
    return {**metrics, **{f"ce_{corruption}": value for corruption, value in relative.items()}}


def _place(location: str, tfds_name: str) -> tuple[str, str]:
    """Returns `data.source` and `data.root` for a location."""
    kind, _, data_dir = location.partition(":")
    return (f"tfds:{tfds_name}", data_dir) if kind == "tfds" else ("folder", location)


def _corrupted(location: str, corruption: str, severity: int) -> tuple[str, str]:
    spec = SETS["imagenet-c"].format(corruption=corruption, severity=severity)
    kind, root = _place(location, spec)
    if kind != "folder":
        return kind, root
    # The archives hold one folder per corruption; some group these in one folder per kind of corruption.
    top = Path(os.path.expanduser(root))
    for candidate in (top / corruption, *sorted(top.glob(f"*/{corruption}"))):
        if (candidate / str(severity)).is_dir():
            return kind, str(candidate / str(severity))
    raise UserError(f"'{root}' has no folder {corruption}/{severity}: it is not ImageNet-C, or incomplete")


class _Restricted(nnx.Module):
    """A classifier restricted to some of its classes."""

    def __init__(self, model: ConvNeXtV2, classes: tuple[int, ...]):
        self.model = model
        self.classes = classes

    def __call__(self, images):
        return self.model(images)[:, jnp.array(self.classes)]


def _evaluate(model, config: ConfigDict, source: "Source", present_only: bool, mesh: Mesh) -> Metrics:
    from cnx2_jax.data.images import eval_batches

    if present_only:
        classes = np.unique(source.all_labels())
        model = _Restricted(model, tuple(classes.tolist()))
        table = np.zeros(len(source.class_names), np.int32)
        table[classes] = np.arange(len(classes))
        source = source.relabelled(table, tuple(source.class_names[label] for label in classes))
    batches = sharding.put_batches(eval_batches(source, config, **processes.share()), mesh)
    return evaluate(model, config.data.mean, config.data.std, batches)
