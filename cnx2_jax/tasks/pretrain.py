"""FCMAE pretraining: reconstruct the masked patches."""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.checkpoints.metadata import make_card
from cnx2_jax.configuration import image_hw
from cnx2_jax.evaluation.metrics import average
from cnx2_jax.models.fcmae import FCMAE, Output, paste
from cnx2_jax.models.pixels import denormalise, normalise
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.observe.grid import draw_grid
from cnx2_jax.tasks import base, models
from cnx2_jax.train.step import sample_keys
from cnx2_jax.train.task import Data
from cnx2_jax.types import Batch, Metrics

EVAL_STEP = 2**31 - 1  # masks of evaluation are drawn as at a step that no run reaches
PICTURES = 8  # rows of the grid that an evaluation writes
HIDDEN_GREY = 128


class Pretrain:
    """FCMAE on the images of a config; labels are not used.

    Evaluation gives `loss`, on masks that are a function of the seed and the image's place alone.
    `platform` is what the model is built for; see `models.build`.
    """

    best: tuple[str, Literal["max", "min"]] = ("loss", "min")

    def __init__(self, config: ConfigDict, platform: str | None = None):
        base.check(config)
        self.config = config
        self._platform = platform
        # What only masking can refuse, refused before anything is made.
        height, width = image_hw(config)
        jax.eval_shape(lambda key: self.init(nnx.Rngs(key)).mask(key[None], height, width), jax.random.key(0))
        self.images = base.open_images(config)
        self.data: Data = self.images

    def init(self, rngs: nnx.Rngs) -> FCMAE:
        model = models.build(self.config, 0, rngs, self._platform)
        assert isinstance(model, FCMAE)
        return model

    def start(self, params: Params) -> Params:
        return params

    def begin(self, params: Params) -> None:
        pass  # no batch depends on them

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        return batch  # every image is for itself

    def loss(self, model: FCMAE, batch: Batch, keys: jax.Array):
        images = normalise(batch["image"], self.config.data.mean, self.config.data.std)
        return model(images, keys).loss.mean(), {}

    def evaluate(self, model: FCMAE, batches: Iterable[Batch]) -> Metrics:
        return average(self._score, model, batches)

    def _score(self, model: FCMAE, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), EVAL_STEP)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        images = normalise(batch["image"], self.config.data.mean, self.config.data.std)
        return {"loss": model(images, keys, train=False).loss}

    def pictures(self, model: FCMAE) -> dict[str, np.ndarray]:
        return {"reconstructions": reconstruct(model, self.config, some_images(self.images))}

    def card(self) -> dict:
        return make_card(self.config, ())


def some_images(data: Data) -> np.ndarray:
    """Returns the first few validation images, uint8 `[N, H, W, C]`."""
    batch = next(iter(data.eval_batches()))
    return batch["image"][batch["mask"]][:PICTURES]


def reconstruct(model: FCMAE, config: ConfigDict, images: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Masks images and draws what the model makes of them.

    Args:
      model: a pretrained model.
      config: of its run.
      images: uint8 `[N, H, W, C]`.
      seed: of the masks; the run's by default.

    Returns:
      A uint8 grid `[H', W', 3]`, a row per image: original, masked, reconstruction, pasted.
    """
    keys = sample_keys(config.seed if seed is None else seed, jnp.int32(EVAL_STEP), len(images))
    graph, params = split(model)
    # One device is enough for a few rows, and it spares dividing them over a mesh.
    normal = normalise(jnp.asarray(images), config.data.mean, config.data.std)
    output = _forward(graph, jax.device_get(params), normal, keys)
    reconstruction, pasted = paste(normal, output.prediction, output.masked)
    hidden = np.repeat(np.repeat(output.masked, model.encoder.stride, 1), model.encoder.stride, 2)
    columns = {
        "original": images,
        "masked": np.where(hidden[..., None], np.uint8(HIDDEN_GREY), images),
        "reconstruction": denormalise(reconstruction, config.data.mean, config.data.std),
        "pasted": denormalise(pasted, config.data.mean, config.data.std),
    }
    return draw_grid({name: np.asarray(column) for name, column in columns.items()})


@partial(jax.jit, static_argnames="graph")
def _forward(graph: nnx.GraphDef, params: Params, images: jax.Array, keys: jax.Array) -> Output:
    return merge(graph, params)(images, keys, train=False)
