"""Grad-CAM (Selvaraju et al., arXiv 1610.02391): which places of an image raise an output of a classifier."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict, FrozenConfigDict

from cnx2_jax.evaluation.features import Batches
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import Params, merge, split

Maps = Float[Array, "b outputs h w"]


def heatmaps(
    model: ConvNeXtV2, config: ConfigDict, batches: Batches, *, each: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields each image, uint8 `[H, W, C]`, and its heat maps, float32 `[outputs, h, w]`, not negative.

    A map is the sum of the last stage's channels, each times the mean gradient of the output with
    respect to it; negative sums are 0.

    Args:
      model: a classifier with a head.
      config: of its run, for the normalisation.
      batches: as `data.images.eval_batches` gives them.
      each: explain every output; otherwise only the largest of each image.
    """
    graph, params = split(model)
    data = FrozenConfigDict({"mean": config.data.mean, "std": config.data.std})
    for batch in batches:
        heat = np.asarray(_heat(graph, params, batch["image"], data, each))
        mask = np.asarray(batch["mask"])
        yield from zip(np.asarray(batch["image"])[mask], heat[mask], strict=True)


@partial(jax.jit, static_argnames=("graph", "data", "each"))
def _heat(graph: nnx.GraphDef, params: Params, images: jax.Array, data: FrozenConfigDict, each: bool) -> Maps:
    model = merge(graph, params)
    stage = model.features(normalise(images, data.mean, data.std))[-1]

    def head(stage: Array) -> Array:
        return model.head(model.norm(stage.mean(axis=(1, 2), dtype=model.norm.dtype)))

    numbers, pull_back = jax.vjp(head, stage)
    count = numbers.shape[1]

    def map_of(outputs: Int[Array, " b"]) -> Array:
        (gradient,) = pull_back(jax.nn.one_hot(outputs, count, dtype=numbers.dtype))
        weights = gradient.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
        return jax.nn.relu((weights * stage).sum(axis=-1))

    if not each:
        return map_of(numbers.argmax(axis=1))[:, None]
    return jnp.stack([map_of(jnp.full(len(images), output)) for output in range(count)], axis=1)
