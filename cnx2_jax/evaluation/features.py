"""What a network makes of images, batch by batch: feature vectors and class probabilities."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict, FrozenConfigDict

from cnx2_jax.data.images import eval_batches
from cnx2_jax.data.sources import Source
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.observe.progress import watched
from cnx2_jax.train import sharding

Batches = Iterable[Mapping[str, jax.Array | np.ndarray]]
Vectors = Float32[np.ndarray, "n dim"]


def features(
    model: ConvNeXtV2, config: ConfigDict, batches: Batches
) -> Iterator[tuple[Vectors, Int32[np.ndarray, " n"]]]:
    """Yields the vectors that the head would see (`ConvNeXtV2.pooled`), and the labels, of each batch.

    Args:
      model: a classifier, or a pretrained encoder (see `models.without_decoder`).
      config: of its run, for the normalisation.
      batches: as `data.pipeline.eval_batches` gives them; padding is left out.
    """
    for batch, mask, vectors, _ in _outputs(model, config, batches):
        yield vectors[mask], np.asarray(batch["label"])[mask]


def predictions(
    model: ConvNeXtV2, config: ConfigDict, batches: Batches
) -> Iterator[tuple[Vectors, Float32[np.ndarray, "n classes"]]]:
    """Yields the vectors of `features`, and class probabilities; without a head there are none, `[n, 0]`."""
    for _, mask, vectors, shares in _outputs(model, config, batches):
        yield vectors[mask], shares[mask]


def all_features(
    model: ConvNeXtV2, config: ConfigDict, source: Source, mesh: Mesh
) -> tuple[Vectors, Int32[np.ndarray, " n"]]:
    """Returns the vectors and labels of all images of a source that can be read, in its order.

    Args:
      model, config: see `features`; the model lives on `mesh`.
      source: its images are prepared as for evaluation, `config.batch_size` at a time.
    """
    # Filled in place: vectors of a million images should not be there twice.
    vectors = np.empty((source.num_records, model.dims[-1]), np.float32)
    labels = np.empty(source.num_records, np.int32)
    count = 0
    batches = sharding.put_batches(watched(eval_batches(source, config), source.num_records), mesh)
    for some, of_them in features(model, config, batches):
        there = slice(count, count := count + len(some))
        vectors[there], labels[there] = some, of_them
    return vectors[:count], labels[:count]


def _outputs(model: ConvNeXtV2, config: ConfigDict, batches: Batches):
    graph, params = split(model)
    data = FrozenConfigDict({"mean": config.data.mean, "std": config.data.std})
    for batch in batches:
        vectors, shares = _forward(graph, params, batch["image"], data)
        yield batch, np.asarray(batch["mask"]), np.asarray(vectors), np.asarray(shares)


@partial(jax.jit, static_argnames=("graph", "data"))
def _forward(graph: nnx.GraphDef, params: Params, images: jax.Array, data: FrozenConfigDict):
    model = merge(graph, params)
    vectors = model.pooled(normalise(images, data.mean, data.std))
    logits = model.head(vectors) if model.num_classes else jnp.zeros((len(images), 0))
    return vectors, jax.nn.softmax(logits, axis=-1)
