"""k-NN evaluation: classifies each image by its nearest training images, without any training."""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.features import all_features
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.types import Metrics

if TYPE_CHECKING:  # data needs TensorFlow
    from cnx2_jax.data.images import ImageData

TEMPERATURE = 0.07  # of the votes (Wu et al. 2018, section 3.4; DINO, facebookresearch/dino eval_knn.py)
MOST = 1000  # neighbours; every query keeps all of its k in memory

# Similarities are computed for this many queries and training images at a time: 128 MiB.
_QUERIES = 512
_BANK = 65_536


def evaluate(model: ConvNeXtV2, config: ConfigDict, data: "ImageData", k: int, mesh: Mesh) -> Metrics:
    """Classifies a run's validation images by its training images, both prepared as for evaluation.

    Args:
      model: a classifier (its head is not used) or a pretrained encoder; it lives on `mesh`.
      config: the config of its run.
      data: the run's images.
      k: number of neighbours that vote.
      mesh: the devices.

    Returns:
      `knn_accuracy` and `knn_top5_accuracy`; see `score`.

    Raises:
      UserError: the images have no classes, or `k` is out of range.
    """
    if not data.class_names:
        raise UserError(
            f"--knn needs classes, and data.source '{config.data.source}' with data.root "
            f"'{config.data.root}' has none; put the images of each class into one sub-folder"
        )
    most = min(data.num_train, MOST)
    if not 1 <= k <= most:
        raise UserError(f"--knn {k} must be at least 1 and at most {most}; 20 is usual")
    bank, bank_labels = all_features(model, config, data.train, mesh)
    queries, labels = all_features(model, config, data.val, mesh)
    metrics = score(bank, bank_labels, queries, labels, num_classes=len(data.class_names), k=k)
    return {f"knn_{name}": value for name, value in metrics.items()}


def score(
    bank: Float32[np.ndarray, "m dim"],
    bank_labels: Int32[np.ndarray, " m"],
    queries: Float32[np.ndarray, "n dim"],
    labels: Int32[np.ndarray, " n"],
    *,
    num_classes: int,
    k: int,
) -> Metrics:
    """Scores weighted k-NN classification, as in DINO: the `k` vectors of the bank with the largest cosine
    similarity s to a query vote for their labels, each with weight exp(s / 0.07).

    The device holds the queries and one part of the bank at a time.

    Args:
      bank: vectors of the training images.
      bank_labels: their labels.
      queries: vectors of the validation images.
      labels: their labels.
      num_classes: number of classes.
      k: number of neighbours that vote.

    Returns:
      `accuracy` and `top5_accuracy`: the shares of queries whose label got the most votes, or was among the
      five with the most votes. Of equal votes the lower label wins; a label without votes is never right.
    """
    vectors = _chunks(queries, _QUERIES)
    nearest = jnp.full((*vectors.shape[:2], k), -jnp.inf), jnp.zeros((*vectors.shape[:2], k), jnp.int32)
    size = min(_BANK, len(bank))
    # The outer loop is over the bank, so that each part is sent to the device once.
    for start in range(0, len(bank), size):
        part = slice(start, start + size)
        (rows,), (of_rows,) = _chunks(bank[part], size), _chunks(bank_labels[part], size)
        nearest = _nearer(nearest, vectors, rows, of_rows, len(bank[part]))
    ranks = np.asarray(_ranks(nearest, _chunks(labels, _QUERIES), num_classes)).ravel()[: len(labels)]
    return {"accuracy": float((ranks < 1).mean()), "top5_accuracy": float((ranks < 5).mean())}


def _chunks(rows: np.ndarray, size: int) -> np.ndarray:
    """Splits rows `[n, ...]` into `[chunks, size, ...]` and pads the last chunk with zeros."""
    padded = np.zeros((-(-len(rows) // size) * size, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded.reshape(-1, size, *rows.shape[1:])


@jax.jit
def _nearer(nearest, queries, bank, bank_labels, count):
    """Merges a part of the bank, `count` rows without its padding, into the nearest rows of all queries.

    `nearest` is a pair of similarities and labels, `[chunks, size, k]`. On a tie the earlier row stays.
    """

    def of_chunk(chunk):
        (similarities, labels), vectors = chunk
        k = similarities.shape[1]
        new = jnp.matmul(_unit(vectors), _unit(bank).T, precision=jax.lax.Precision.HIGHEST)
        new = jnp.where(jnp.arange(len(bank)) < count, new, -jnp.inf)
        new, places = jax.lax.top_k(new, min(k, len(bank)))
        merged = jnp.concatenate([similarities, new], axis=1)
        merged_labels = jnp.concatenate([labels, bank_labels[places]], axis=1)
        similarities, places = jax.lax.top_k(merged, k)
        return similarities, jnp.take_along_axis(merged_labels, places, axis=1)

    return jax.lax.map(of_chunk, (nearest, queries))


def _unit(vectors):
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames="num_classes")
def _ranks(nearest, labels, num_classes):
    """Returns how many classes got more votes than the label, `[chunks, size]`; INT32_MAX without votes."""

    def of_chunk(chunk):
        (similarities, voted), labels = chunk
        each = jnp.arange(len(labels))[:, None]
        votes = jnp.zeros((len(labels), num_classes)).at[each, voted].add(jnp.exp(similarities / TEMPERATURE))
        label_votes = jnp.take_along_axis(votes, labels[:, None], axis=1)
        lower = jnp.arange(num_classes) < labels[:, None]
        rank = ((votes > label_votes) | ((votes == label_votes) & lower)).sum(axis=1)
        return jnp.where(label_votes[:, 0] > 0, rank, jnp.iinfo(jnp.int32).max)

    return jax.lax.map(of_chunk, (nearest, labels))
