"""Small networks of every kind that can be exported, their results, and parameters for tests of names."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig

MEAN, STD = (0.5, 0.4, 0.3, 0.6, 0.7), (0.2, 0.25, 0.3, 0.15, 0.1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network and the size of its images; oblong, so that rows and columns cannot be confused."""

    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 7
    uint8: bool = False

    def __str__(self) -> str:
        head = "head" if self.num_classes else "features"
        return f"patch{self.patch_size}-{self.in_chans}-{head}-{'uint8' if self.uint8 else 'float32'}"


KINDS = [
    Kind(),
    Kind(patch_size=1, in_chans=5),
    Kind(patch_size=1, in_chans=1, num_classes=0, uint8=True),
    Kind(patch_size=4, in_chans=5, uint8=True),
]


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations: these tests compile much and run little."""


@pytest.fixture(scope="session")
def network(build):
    """The function `network(kind, seed=0, **options)`: a ConvNeXtV2 with random weights, also in GRN."""

    def make(kind, seed=0, **options):
        sizes = {"patch_size": kind.patch_size, "in_chans": kind.in_chans}
        config = EncoderConfig((1, 1, 2, 1), (8, 16, 24, 32), **sizes, **options)
        return build(ConvNeXtV2, config, num_classes=kind.num_classes, seed=seed)

    return make


@pytest.fixture(scope="session")
def inference_model(network):
    """The function `inference_model(kind=the first, **options)`: its InferenceModel."""

    def make(kind=KINDS[0], **options):
        size = (8 * kind.patch_size, 16 * kind.patch_size)
        mean, std = MEAN[: kind.in_chans], STD[: kind.in_chans]
        return InferenceModel(network(kind, **options), size, mean=mean, std=std, uint8=kind.uint8)

    return make


@pytest.fixture(scope="session")
def example(network, inference_model):
    """The function `example(kind=the first)`: five images and the network's results; NumPy normalises."""

    @functools.cache
    def make(kind=KINDS[0]):
        images = given = inference_model(kind).some_images(5)
        if kind.uint8:
            mean, std = np.array(MEAN[: kind.in_chans]), np.array(STD[: kind.in_chans])
            given = ((images / 255 - mean) / std).astype(np.float32)
        return images, np.asarray(jax.jit(lambda model, x: model(x))(network(kind), given))

    return make


@pytest.fixture(scope="session", params=KINDS, ids=str)
def kind(request) -> Kind:
    return request.param


# For what sees no values: little time and memory.

SMALL = EncoderConfig((1, 2, 1, 1), (8, 16, 24, 40))


def numbered(build) -> dict[str, np.ndarray]:
    """Returns the parameters of `build()` by our names, with different consecutive bytes in each."""
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    most = max(math.prod(leaf.shape) for _, leaf in state)
    pool = np.resize(np.arange(251, dtype=np.uint8), 251 + most)
    return {
        ".".join(map(str, path)): pool[index % 251 :][: math.prod(leaf.shape)].reshape(leaf.shape)
        for index, (path, leaf) in enumerate(state)
    }


def named(kind, **options) -> dict[str, np.ndarray]:
    return numbered(lambda: kind(SMALL, rngs=nnx.Rngs(0), **options))


@pytest.fixture(scope="session")
def numbered_params():
    """The function `numbered(build)`."""
    return numbered


@pytest.fixture
def small():
    """Parameters of a small ConvNeXtV2 with three classes."""
    return named(ConvNeXtV2, num_classes=3)


@pytest.fixture
def small_encoder():
    """Parameters of the same network without a head."""
    return named(ConvNeXtV2, num_classes=0)


@pytest.fixture
def small_fcmae():
    """Parameters of a small FCMAE."""
    return named(FCMAE, decoder_dim=12, decoder_depth=2)
