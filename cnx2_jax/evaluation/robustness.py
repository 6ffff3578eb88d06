"""ImageNet's other validation sets: how accuracy holds on images unlike those trained on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cnx2_jax.cluster import processes
from cnx2_jax.data.images import eval_batches
from cnx2_jax.data.sources import Source, open_set
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.evaluation.classification import evaluate
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.train import sharding
from cnx2_jax.types import Metrics

# Top-1 errors of AlexNet, means over the five severities, which ImageNet-C's errors are divided by
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

# Which of TFDS's data sets each is; ImageNet-C is one a corruption and severity.
SETS = {
    "imagenet-a": "imagenet_a:test",
    "imagenet-r": "imagenet_r:test",
    "imagenet-sketch": "imagenet_sketch:test",
    "imagenet-v2": "imagenet_v2/matched-frequency:test",
    "imagenet-c": "imagenet2012_corrupted/{corruption}_{severity}:validation",
}
# Those of 200 of the 1,000 classes, scored as if the model knew no others.
OF_PRESENT_CLASSES = ("imagenet-a", "imagenet-r")


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
      config: of its run.
      class_names: of its outputs, as the set's folders are named: WordNet ids.
      name: one of SETS.
      location: the set's folder as it was published, or "tfds" or "tfds:DATA_DIR".
      mesh: where the model lives.

    Returns:
      `accuracy`, `top5_accuracy` and `loss`; of ImageNet-C their means over all corruptions and
      severities, `mce`, and each corruption's error relative to AlexNet's as `ce_NAME`.

    Raises:
      UserError: an unknown set; images that are missing, or of classes that the model does not know.
    """
    check(name)
    config = config.copy_and_resolve_references()
    config.unlock()

    def scored(place: tuple[str, str]) -> Metrics:
        return _evaluate(model, config, open_set(*place, class_names), name in OF_PRESENT_CLASSES, mesh)

    if name != "imagenet-c":
        return scored(_place(location, SETS[name]))
    config.data.eval_crop = 1.0  # its images are cropped already
    return corruption_errors(lambda corruption, severity: scored(_corrupted(location, corruption, severity)))


def corruption_errors(scored: Callable[[str, int], Metrics]) -> Metrics:
    """Evaluates all corruptions at all severities, and gives their mean corruption error.

    The errors of a corruption are averaged over severities and divided by AlexNet's; `mce` is the mean of
    that over corruptions (Hendrycks & Dietterich 2019, section 4.1).
    """
    rows = {
        corruption: [scored(corruption, severity) for severity in SEVERITIES] for corruption in ALEXNET_ERRORS
    }
    metrics = {
        key: float(np.mean([[row[key] for row in of_one] for of_one in rows.values()]))
        for key in rows["gaussian_noise"][0]
    }
    relative = {
        corruption: float(np.mean([1 - row["accuracy"] for row in of_one])) / ALEXNET_ERRORS[corruption]
        for corruption, of_one in rows.items()
    }
    metrics["mce"] = float(np.mean(list(relative.values())))
    return {**metrics, **{f"ce_{corruption}": value for corruption, value in relative.items()}}


def _place(location: str, tfds_name: str) -> tuple[str, str]:
    """The names of a source and of its root."""
    kind, _, data_dir = location.partition(":")
    return (f"tfds:{tfds_name}", data_dir) if kind == "tfds" else ("folder", location)


def _corrupted(location: str, corruption: str, severity: int) -> tuple[str, str]:
    spec = SETS["imagenet-c"].format(corruption=corruption, severity=severity)
    kind, root = _place(location, spec)
    if kind != "folder":
        return kind, root
    # The archives hold a folder a corruption; some keep them in one folder a kind of corruption.
    top = Path(os.path.expanduser(root))
    for candidate in (top / corruption, *sorted(top.glob(f"*/{corruption}"))):
        if (candidate / str(severity)).is_dir():
            return kind, str(candidate / str(severity))
    raise UserError(f"'{root}' has no folder {corruption}/{severity}: it is not ImageNet-C, or not all of it")


class _Restricted(nnx.Module):
    """A classifier that knows some of its classes only."""

    def __init__(self, model: ConvNeXtV2, classes: tuple[int, ...]):
        self.model = model
        self.classes = classes

    def __call__(self, images):
        return self.model(images)[:, jnp.array(self.classes)]


def _evaluate(model, config: ConfigDict, source: Source, of_present_classes: bool, mesh: Mesh) -> Metrics:
    if of_present_classes:
        classes = np.unique(_labels(source))
        model = _Restricted(model, tuple(classes.tolist()))
        table = np.zeros(len(source.class_names), np.int32)
        table[classes] = np.arange(len(classes))
        source = source.relabelled(table, tuple(source.class_names[label] for label in classes))
    batches = sharding.put_batches(eval_batches(source, config, **processes.share()), mesh)
    return evaluate(model, config.data.mean, config.data.std, batches)


def _labels(source: Source) -> np.ndarray:
    if source.labels is not None:
        return source.labels
    labels = tf.data.Dataset.range(source.num_records).map(lambda index: source.read(index)["label"])
    return np.fromiter(labels.as_numpy_iterator(), np.int32)
