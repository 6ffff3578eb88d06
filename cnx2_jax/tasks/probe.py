"""Linear probe: a linear classifier on the features of a frozen encoder, which are computed once."""

import functools
import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict

from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.classification import class_scores
from cnx2_jax.evaluation.features import all_features
from cnx2_jax.evaluation.metrics import evaluate
from cnx2_jax.files import local_path, replacing
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.models.state import Params, merge, split
from cnx2_jax.tasks.classify import Classify
from cnx2_jax.train.optimizer import trainable
from cnx2_jax.train.sharding import AXES, put_params

if TYPE_CHECKING:
    from cnx2_jax.data.images import ImageData
    from cnx2_jax.data.sources import Source
from cnx2_jax.train.terms import Terms, mean_of
from cnx2_jax.types import Batch, Metrics

AT_ONCE = 64  # images per device whose features are computed at a time
Features = tuple[Float32[np.ndarray, "n dim"], Int32[np.ndarray, " n"]]


class FeatureData:
    """Batches of standardised features, float32 [b, dim], and their labels, in the place of images.

    Every process computes all of them, once; with `data.feature_cache`, a folder, they are kept there for
    other runs.

    Args:
      images: what they are the features of.
      config: of the run.

    Attributes:
      statistics: mean and deviation `[dim]` of the training images' features before they are standardised.
    """

    def __init__(self, images: "ImageData", config: ConfigDict):
        self.images = images
        self._config = config
        self._encoder = ""

    @property
    def num_train(self) -> int:
        return self.images.num_train

    @property
    def num_val(self) -> int:
        return self.images.num_val

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    def encode(self, init: Callable[[nnx.Rngs], nnx.Module], params: Params) -> None:
        """Computes the features by a classifier's encoder, unless that is done already.

        Its final norm has no part in them, as they are standardised.

        Args:
          init: makes the classifier.
          params: its parameters.

        Raises:
          UserError: see `ImageData` and `_kept`.
        """
        host: dict[str, np.ndarray] = {name: np.asarray(leaf) for name, leaf in params.items()}
        encoder = _digest(host)
        if encoder == self._encoder:
            return
        # This process's devices alone: every process needs all features.
        devices = np.array(jax.local_devices()).reshape(-1, 1)
        mesh = Mesh(devices, AXES)
        graph, _ = split(nnx.eval_shape(lambda: init(nnx.Rngs(0))))
        dim = len(host["norm.scale"])
        plain = {"norm.scale": np.ones(dim, np.float32), "norm.bias": np.zeros(dim, np.float32)}
        model = merge(graph, put_params(host | plain, mesh))
        config = self._config.copy_and_resolve_references()
        config.unlock()
        config.batch_size = AT_ONCE * devices.size

        def features(source: "Source") -> Features:
            if not self._config.data.feature_cache:
                return all_features(model, config, source, mesh)
            path = local_path(self._config.data.feature_cache) / f"{_name(encoder, source, config)}.npz"
            return _kept(path, lambda: all_features(model, config, source, mesh))

        self._hold(features(self.images.train), features(self.images.val))
        self._encoder = encoder

    def _hold(self, train: Features, val: Features) -> None:
        """Takes in both splits, and standardises them in place: of a million images once is enough."""
        mean = train[0].mean(axis=0, dtype=np.float64)
        deviation = np.sqrt(train[0].var(axis=0, dtype=np.float64) + 1e-6)
        # Of every feature over the training images, before they are standardised.
        self.statistics = mean.astype(np.float32), deviation.astype(np.float32)
        for vectors, _ in (train, val):
            vectors -= self.statistics[0]
            vectors /= self.statistics[1]
        self._train, self._val = train, val

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's share of the batches from `start_step` on, in the order that images have."""
        from cnx2_jax.data.order import epoch_order

        vectors, labels = self._train
        order = functools.lru_cache(2)(lambda epoch: epoch_order(epoch, len(labels), self._config.seed))
        for step in itertools.count(start_step):
            positions = self._share(step, process_index, process_count)
            epochs, places = np.divmod(positions, len(labels))
            records = np.array([order(epoch)[place] for epoch, place in zip(epochs, places, strict=True)])
            yield {"features": vectors[records], "label": labels[records]}

    def eval_batches(
        self, *, process_index: int = 0, process_count: int = 1
    ) -> Iterable[dict[str, np.ndarray]]:
        """Yields this host's share of one pass; where it runs past the end, `mask` is False."""
        vectors, labels = self._val
        for step in range(-(-len(labels) // self._config.batch_size)):
            positions = self._share(step, process_index, process_count)
            records = np.minimum(positions, len(labels) - 1)
            yield {"features": vectors[records], "label": labels[records], "mask": positions < len(labels)}

    def _share(self, step: int, process_index: int, process_count: int) -> np.ndarray:
        batch = self._config.batch_size
        share = batch // process_count
        return step * batch + process_index * share + np.arange(share)


def _digest(params: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(params):
        if not name.startswith(("norm.", "head.")):
            digest.update(name.encode() + np.asarray(params[name]).tobytes())
    return digest.hexdigest()


def _name(encoder: str, source: "Source", config: ConfigDict) -> str:
    """Names the features of these images by this encoder, by all that they depend on.

    Of the images by a hundred of them, spread over all, and by all labels that can be seen without reading.
    """
    data = config.data
    digest = hashlib.sha256()
    facts = {
        "encoder": encoder,
        "classes": [source.num_records, source.class_names],
        "prepared": [list(config.image_size), data.eval_crop, list(data.mean), list(data.std)],
        "computed": [config.model.dtype, config.model.in_chans, data.unreadable],
        "bands": [data.bands, data.use_bands, data.no_data, data.layout, data.array],
    }
    digest.update(json.dumps(facts).encode())
    if source.labels is not None:
        digest.update(np.asarray(source.labels).tobytes())
    for index in np.unique(np.linspace(0, source.num_records - 1, 100).astype(int)):
        record = source.read(np.int64(index))
        digest.update(record["image"].numpy() + str(int(record["label"])).encode())
    return digest.hexdigest()[:32]


def _kept(path: Path, compute: Callable[[], Features]) -> Features:
    """Reads features from a file, or computes them and writes it, whole or not at all.

    Raises:
      UserError: the file is damaged, or the folder cannot be written to, which is seen before computing.
    """
    try:
        if path.exists():
            with np.load(path) as stored:
                return stored["features"], stored["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"data.feature_cache: '{path}' cannot be read ({error}); remove it") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            features = compute()
            np.savez(file, features=features[0], labels=features[1])
    except OSError as error:
        raise UserError(f"data.feature_cache: cannot write '{path}': {error.strerror}") from None
    return features


class Probe(Classify, name="probe"):
    """Trains the head alone, on images prepared as for evaluation, of an encoder from `config.init_from`.

    The features are standardised over the training images, as by a batch normalisation without parameters
    (MAE, arXiv 2111.06377, appendix A.1). Mean and deviation become the final norm's bias and scale, so a
    checkpoint is an ordinary classifier. Without `init_from` the encoder is random, as a baseline.

    Raises:
      UserError: `optimizer.trainable` is not the head; see `Classify`.
    """

    prepare_normalises = False
    ranges: ClassVar = {"model.head_init_scale": Classify.ranges["model.head_init_scale"]}

    @classmethod
    def add_keys(cls, config: ConfigDict) -> None:
        config.init_from = ""  # a checkpoint whose encoder is frozen; empty: a random one
        config.init_bands = ""  # how its stem fits images of other bands: mean, tile, map:R,G,B or fresh
        config.model.head_init_scale = 1.0  # factor on the initial weights of the head
        config.data.labels = config.data.classes = ""  # as for the task classify
        config.data.feature_cache = ""  # a folder where runs keep the features for each other
        config.optimizer.trainable = "^head\\."  # the head alone

    def check_data(self) -> None:
        super().check_data()
        _, shapes = split(nnx.eval_shape(lambda: self.init(nnx.Rngs(0))))
        others = [name for name in trainable(shapes, self.config.optimizer.trainable) if not _in_head(name)]
        if others:
            raise UserError(
                f"optimizer.trainable '{self.config.optimizer.trainable}' has '{others[0]}' trained, but a "
                "linear probe trains the head alone, on features that it keeps; use '^head'"
            )

    def open_data(self) -> FeatureData:
        return FeatureData(super().open_data(), self.config)

    @property
    def images(self) -> "ImageData":
        return self.data.images

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        _, shapes = split(nnx.eval_shape(lambda: self.init(nnx.Rngs(0))))
        dim, count = shapes["head.kernel"].shape[0], self.config.batch_size
        return {
            "features": jax.ShapeDtypeStruct((count, dim), np.float32),
            "label": jax.ShapeDtypeStruct((count,), np.int32),
        }

    def start(self, arrays: Params) -> Params:
        """Returns the encoder's parameters, and a final norm whose output is standardised."""
        arrays = super().start(arrays)
        self.begin(arrays)
        mean, deviation = self.data.statistics
        return {**arrays, "norm.scale": 1 / deviation, "norm.bias": -mean / deviation}

    def begin(self, arrays: Params) -> None:
        self.data.encode(self.init, arrays)

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        return batch  # nothing is mixed

    def loss(self, model: ConvNeXtV2, batch: Batch, keys: jax.Array) -> tuple[Terms, Terms]:
        logits = model.head(batch["features"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": mean_of(loss)}, {"accuracy": mean_of(logits.argmax(axis=-1) == batch["label"])}

    def score(self, model: ConvNeXtV2, batch: Batch, positions: jax.Array) -> dict[str, jax.Array]:
        """Scores features in training; a checkpoint is evaluated on images."""
        if "image" in batch:
            return super().score(model, batch, positions)
        return class_scores(model.head(batch["features"]), batch["label"])

    def evaluate(self, model: ConvNeXtV2, batches: Iterable[Batch]) -> Metrics:
        return evaluate(self, model, batches)


def _in_head(name: str) -> bool:
    return name.startswith("head.")
