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
    model: ConvNeXtV2, config: ConfigDict, batches: Batches
) -> Iterator[tuple[Vectors, Float32[np.ndarray, "n classes"]]]:
    """Yields feature vectors and class probabilities of each batch; without a head these are `[n, 0]`."""
    for _, mask, vectors, probabilities in _outputs(model, config, batches):
        yield vectors[mask], probabilities[mask]


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


def _outputs(model: ConvNeXtV2, config: ConfigDict, batches: Batches):
    graph, params = split(model)
    data = FrozenConfigDict({"mean": config.data.mean, "std": config.data.std})
    for batch in batches:
        vectors, probabilities = _forward(graph, params, batch["image"], data)
        yield batch, np.asarray(batch["mask"]), np.asarray(vectors), np.asarray(probabilities)


@partial(jax.jit, static_argnames=("graph", "data"))
def _forward(graph: nnx.GraphDef, params: Params, images: jax.Array, data: FrozenConfigDict):
    model = merge(graph, params)
    vectors = model.pooled(normalise(images, data.mean, data.std))
    logits = model.head(vectors) if model.num_classes else jnp.zeros((len(images), 0))
    return vectors, jax.nn.softmax(logits, axis=-1)
