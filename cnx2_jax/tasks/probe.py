"""Linear probe: a linear classifier on the features of a frozen encoder, which are computed once."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict

from cnx2_jax.data.pipeline import ImageData, epoch_order
from cnx2_jax.data.sources import Source
from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.tasks.classify import Classify, class_scores
from cnx2_jax.tasks.features import all_features
from cnx2_jax.train.evaluation import average
from cnx2_jax.train.sharding import AXES, put_params
from cnx2_jax.train.state import Params, merge, split
from cnx2_jax.train.task import Batch, Metrics

AT_ONCE = 64  # images per device whose features are computed at a time
Features = tuple[Float32[np.ndarray, "n dim"], Int32[np.ndarray, " n"]]


class Probe(Classify):
    """Trains the head alone, on images prepared as for evaluation, of an encoder from `config.init_from`.

    The features are standardised over the training images, as by a batch normalisation without parameters
    (MAE, arXiv 2111.06377, appendix A.1). Mean and deviation become part of the final norm, so a checkpoint
    is an ordinary classifier. Without `init_from` the encoder is random, which is what others compare with.

    Raises:
      UserError: see `Classify`.
    """

    def __init__(self, config: ConfigDict, platform: str | None = None):
        super().__init__(config, platform)
        self.data: FeatureData = FeatureData(self.images, config, self._encoder)

    def _encoder(self) -> tuple[nnx.GraphDef, Params]:
        graph, fresh = split(self.init(nnx.Rngs(self.config.seed)))
        return graph, super().start(fresh)

    def start(self, params: Params) -> Params:
        """Returns the encoder's parameters, and a final norm whose output is standardised."""
        params = super().start(params)
        mean, deviation = self.data.statistics
        return {
            **params,
            "norm.scale": params["norm.scale"] / deviation,
            "norm.bias": (params["norm.bias"] - mean) / deviation,
        }

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        return batch  # nothing is mixed

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array):
        logits = model.head(batch["features"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, {"accuracy": (logits.argmax(axis=-1) == batch["label"]).mean()}

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        return average(_score, model, batches)


def _score(model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
    del positions  # nothing is drawn
    return class_scores(model.head(batch["features"]), batch["label"])


class FeatureData:
    """Batches of standardised features, float32 [b, dim], and their labels, in the place of images.

    Computed when they are first asked for, by every process for itself; with `data.feature_cache`, a folder,
    they are kept there for other runs.

    Args:
      images: what they are the features of.
      config: of the run.
      encoder: gives structure and parameters of the classifier whose features these are.
    """

    def __init__(
        self, images: ImageData, config: ConfigDict, encoder: Callable[[], tuple[nnx.GraphDef, Params]]
    ):
        self.images = images
        self.class_names = images.class_names
        self._config = config
        self._encoder = encoder

    @property
    def num_train(self) -> int:
        return len(self._splits[0][1])

    @property
    def statistics(self) -> tuple[Float32[np.ndarray, " dim"], Float32[np.ndarray, " dim"]]:
        """Mean and deviation of every feature over the training images, before they are standardised."""
        vectors = self._splits[0][0]
        return vectors.mean(axis=0, dtype=np.float64).astype(np.float32), np.sqrt(
            vectors.var(axis=0, dtype=np.float64) + 1e-6
        ).astype(np.float32)

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's share of the batches from `start_step` on, in the order that images have."""
        vectors, labels = self._standardised[0]
        order = functools.lru_cache(2)(lambda epoch: epoch_order(epoch, len(labels), self._config.seed))
        step = start_step
        while True:
            positions = self._share(step, process_index, process_count)
            epochs, places = np.divmod(positions, len(labels))
            records = np.array([order(epoch)[place] for epoch, place in zip(epochs, places, strict=True)])
            yield {"features": vectors[records], "label": labels[records]}
            step += 1

    def eval_batches(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[dict[str, np.ndarray]]:
        """Yields this host's share of one pass; where it runs past the end, `mask` is False."""
        vectors, labels = self._standardised[1]
        for step in range(-(-len(labels) // self._config.batch_size)):
            positions = self._share(step, process_index, process_count)
            records = np.minimum(positions, len(labels) - 1)
            yield {"features": vectors[records], "label": labels[records], "mask": positions < len(labels)}

    def _share(self, step: int, process_index: int, process_count: int) -> np.ndarray:
        batch = self._config.batch_size
        share = batch // process_count
        return step * batch + process_index * share + np.arange(share)

    @functools.cached_property
    def _standardised(self) -> tuple[Features, Features]:
        mean, deviation = self.statistics
        train, val = (((vectors - mean) / deviation, labels) for vectors, labels in self._splits)
        return train, val

    @functools.cached_property
    def _splits(self) -> tuple[Features, Features]:
        graph, params = self._encoder()
        # This process's devices alone: every process needs all features.
        devices = np.array(jax.local_devices()).reshape(-1, 1)
        mesh = Mesh(devices, AXES)
        model = merge(graph, put_params({name: jnp.asarray(leaf) for name, leaf in params.items()}, mesh))
        config = self._config.copy_and_resolve_references()
        config.unlock()
        config.batch_size = AT_ONCE * devices.size

        def compute(source: Source) -> Features:
            return all_features(model, config, source, mesh)

        folder = self._config.data.feature_cache
        if not folder:
            return compute(self.images.train), compute(self.images.val)
        encoder = _digest(params)

        def kept(source: Source) -> Features:
            return _kept(Path(folder) / f"{_name(encoder, source, config)}.npz", lambda: compute(source))

        return kept(self.images.train), kept(self.images.val)


def _digest(params: Params) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        if not name.startswith("head."):
            digest.update(name.encode() + np.asarray(params[name]).tobytes())
    return digest.hexdigest()


def _name(encoder: str, source: Source, config: ConfigDict) -> str:
    """Names the features of these images by this encoder, by what they depend on and is cheap to see."""
    data = config.data
    some = np.unique(np.linspace(0, source.num_records - 1, 100).astype(int))
    facts = {
        "encoder": encoder,
        "records": [source.num_records, [source.describe(int(index)) for index in some]],
        "prepared": [list(config.image_size), data.eval_crop, list(data.mean), list(data.std)],
        "computed": [config.model.dtype, config.model.in_chans, data.unreadable],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _kept(path: Path, compute: Callable[[], Features]) -> Features:
    """Reads features from a file, or computes them and writes it, whole or not at all.

    Raises:
      UserError: the folder cannot be written to, before they are computed; or the file is damaged.
    """
    try:
        if path.exists():
            with np.load(path) as stored:
                return stored["features"], stored["labels"]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                features = compute()
                np.savez(file, features=features[0], labels=features[1])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return features
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data.feature_cache: '{path}' cannot be read or written: {reason}") from None
