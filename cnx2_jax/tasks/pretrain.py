"""FCMAE pretraining: reconstruct the masked patches."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.configuration import image_hw
from cnx2_jax.models.fcmae import FCMAE, paste
from cnx2_jax.models.pixels import denormalise, normalise
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.observe.grid import draw_grid
from cnx2_jax.tasks import models
from cnx2_jax.tasks.base import Task
from cnx2_jax.tasks.pictures import are_colours, coloured
from cnx2_jax.train.step import sample_keys
from cnx2_jax.train.task import Data
from cnx2_jax.train.terms import Terms, mean_of
from cnx2_jax.types import Batch

EVAL_STEP = 2**31 - 1  # masks of evaluation are drawn as at a step that no run reaches
PICTURES = 8  # rows of the grid that an evaluation writes
HIDDEN_GREY = 128


class Pretrain(Task, name="pretrain"):
    """FCMAE on the images of a config; labels are not used.

    Evaluation gives `loss`, on masks that are a function of the seed and the image's place alone.
    """

    ranges: ClassVar = {
        "model.mask_patch": (0, float("inf")),
        "model.decoder_dim": (1, float("inf")),
        "model.decoder_depth": (1, float("inf")),
    }

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.model.layout = "auto"  # of the masked map: masked, gathered, or auto: the faster one
        config.model.mask_ratio = 0.6  # the share of patches that is hidden
        config.model.mask_patch = 0  # side of the hidden squares in pixels; 0: the total stride
        config.model.decoder_dim = 512  # channels of the decoder
        config.model.decoder_depth = 1  # blocks of the decoder

    def check(self) -> None:
        super().check()
        # Errors that masking alone can raise, before anything is made.
        height, width = image_hw(self.config)
        jax.eval_shape(lambda key: self.init(nnx.Rngs(key)).mask(key[None], height, width), jax.random.key(0))

    def init(self, rngs: nnx.Rngs) -> FCMAE:
        model = models.build(self.config, 0, rngs, self.platform)
        assert isinstance(model, FCMAE)
        return model

    def loss(self, model: FCMAE, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        return {"loss": mean_of(model.loss(self.normalise(batch["image"]), keys))}, {}

    def score(self, model: FCMAE, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(self.config.seed), EVAL_STEP)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
        return {"loss": model.loss(self.normalise(batch["image"]), keys, train=False)}

    def pictures(self, model: FCMAE) -> dict[str, np.ndarray]:
        return {"reconstructions": reconstruct(model, self.config, some_images(self.data))}

    def metadata(self) -> dict:
        return make_metadata(self.config, ())  # the weights have no classes, whatever the images have


def some_images(data: Data) -> np.ndarray:
    """Returns the first few validation images, `[N, H, W, C]` as in batches."""
    batch = next(iter(data.eval_batches()))
    return batch["image"][batch["mask"]][:PICTURES]


def reconstruct(model: FCMAE, config: ConfigDict, images: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Masks images and draws what the model makes of them.

    Args:
      model: a pretrained model.
      config: of its run.
      images: `[N, H, W, C]` as in batches.
      seed: of the masks; the run's by default.

    Returns:
      A uint8 grid `[H', W', 3]`, a row per image: original, masked, reconstruction, pasted.
    """
    keys = sample_keys(config.seed if seed is None else seed, jnp.int32(EVAL_STEP), len(images))
    graph, params = split(model)
    # One device is enough for a few rows, and it spares dividing them over a mesh.
    scale = tuple(config.data.mean), tuple(config.data.std)
    arrays = jax.device_get(params)
    as_colours = are_colours(config)
    outputs = _forward(graph, scale, as_colours, arrays, images, keys)
    original, patches, reconstruction, pasted = jax.device_get(outputs)
    shown = {"original": original, "reconstruction": reconstruction, "pasted": pasted}
    if not as_colours:
        shown = coloured(config, shown, "original")
    hidden = np.repeat(np.repeat(patches, model.encoder.stride, 1), model.encoder.stride, 2)
    columns = {
        "original": shown["original"],
        "masked": np.where(hidden[..., None], np.uint8(HIDDEN_GREY), shown["original"]),
        "reconstruction": shown["reconstruction"],
        "pasted": shown["pasted"],
    }
    return draw_grid(columns)


# One program: called one by one, these operations take longer to compile than the model.
@partial(jax.jit, static_argnames=("graph", "scale", "as_colours"))
def _forward(
    graph: nnx.GraphDef,
    scale: tuple[tuple[float, ...], tuple[float, ...]],
    as_colours: bool,
    params: Params,
    images: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns images, the masked patches, and both reconstructions of `paste`; `scale` is mean and std.

    Images and reconstructions are uint8 colours, or else normalised.
    """
    normal = normalise(images, *scale)
    output = merge(graph, params)(normal, keys, train=False)
    reconstruction, pasted = paste(normal, output.prediction, output.masked)
    if not as_colours:
        return normal, output.masked, reconstruction, pasted
    return images, output.masked, denormalise(reconstruction, *scale), denormalise(pasted, *scale)
