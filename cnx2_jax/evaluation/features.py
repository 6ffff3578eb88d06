"""Computes feature vectors and class probabilities of images, batch by batch."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict, FrozenConfigDict

from cnx2_jax.evaluation.outputs import ONE_CLASS, Outputs
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.observe.progress import watched
from cnx2_jax.train import sharding

if TYPE_CHECKING:  # data needs TensorFlow, so it is imported only when images are read
    from cnx2_jax.data.sources import Source

Batches = Iterable[Mapping[str, jax.Array | np.ndarray]]
Vectors = Float32[np.ndarray, "n dim"]


def features(
    model: ConvNeXtV2, config: ConfigDict, batches: Batches
) -> Iterator[tuple[Vectors, Int32[np.ndarray, " n"]]]:
    """Yields the feature vectors (`ConvNeXtV2.pooled`, the head's input) and the labels of each batch.

    Args:
      model: a classifier, or a pretrained encoder (see `models.without_decoder`).
      config: the config of its run, for the normalisation.
      batches: batches of `data.images.eval_batches`; padding is left out.
    """
    for batch, mask, vectors, _ in _outputs(model, config, batches):
        yield vectors[mask], np.asarray(batch["label"])[mask]


def predictions(
    model: ConvNeXtV2,
    config: ConfigDict,
    batches: Batches,
    outputs: Outputs = ONE_CLASS,
    *,
    flip: bool = False,
) -> Iterator[tuple[Vectors, Float32[np.ndarray, "n outputs"]]]:
    """Yields feature vectors and the head's values of each batch; without a head these are `[n, 0]`.

    Args:
      model, config, batches: see `features`.
      outputs: what the head's numbers mean; class probabilities by default.
      flip: average the values over an image and its mirror image; feature vectors are of the image alone.
    """
    for _, mask, vectors, values in _outputs(model, config, batches, outputs, flip):
        yield vectors[mask], values[mask]


def all_features(
    model: ConvNeXtV2, config: ConfigDict, source: "Source", mesh: Mesh
) -> tuple[Vectors, Int32[np.ndarray, " n"]]:
    """Returns the feature vectors and labels of all readable images of a source, in its order.

    Args:
      model, config: see `features`; the model lives on `mesh`.
      source: the images; they are prepared as for evaluation, `config.batch_size` at a time.
      mesh: the devices.
    """
    from cnx2_jax.data.images import eval_batches

    # Filled in place: a list of batches would hold the vectors of a million images twice.
    vectors = np.empty((source.num_records, model.config.dims[-1]), np.float32)
    labels = np.empty(source.num_records, np.int32)
    count = 0
    batches = sharding.put_batches(watched(eval_batches(source, config), source.num_records), mesh)
    for batch_vectors, batch_labels in features(model, config, batches):
        rows = slice(count, count := count + len(batch_vectors))
        vectors[rows], labels[rows] = batch_vectors, batch_labels
    return vectors[:count], labels[:count]


def _outputs(
    model: ConvNeXtV2, config: ConfigDict, batches: Batches, outputs: Outputs = ONE_CLASS, flip: bool = False
):
    graph, params = split(model)
    data = FrozenConfigDict({"mean": config.data.mean, "std": config.data.std})
    for batch in batches:
        vectors, values = _forward(graph, params, batch["image"], data, outputs, flip)
        yield batch, np.asarray(batch["mask"]), np.asarray(vectors), np.asarray(values)


@partial(jax.jit, static_argnames=("graph", "data", "outputs", "flip"))
def _forward(
    graph: nnx.GraphDef,
    params: Params,
    images: jax.Array,
    data: FrozenConfigDict,
    outputs: Outputs,
    flip: bool,
):
    model = merge(graph, params)
    images = normalise(images, data.mean, data.std)
    vectors = model.pooled(images)
    if not model.num_classes:
        return vectors, jnp.zeros((len(images), 0))
    numbers = model.head(vectors)
    if flip:
        numbers = outputs.average(numbers, model(images[:, :, ::-1]))
    return vectors, outputs.value(numbers)
