"""Small networks of every kind that can be exported, and what they give."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cnx2_jax.interop.program import Program
from cnx2_jax.models import ConvNeXtV2

MEAN, STD = (0.5, 0.4, 0.3, 0.6, 0.7), (0.2, 0.25, 0.3, 0.15, 0.1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network, and the images it takes; oblong, so that rows and columns cannot be confused."""

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
def compile_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def network(build):
    """The function `network(kind, seed=0, **options)`: that ConvNeXtV2, weights random and GRN not zero."""

    def make(kind, seed=0, **options):
        sizes = {"patch_size": kind.patch_size, "in_chans": kind.in_chans, "num_classes": kind.num_classes}
        return build(ConvNeXtV2, (1, 1, 2, 1), (8, 16, 24, 32), seed=seed, **sizes, **options)

    return make


@pytest.fixture(scope="session")
def program(network):
    """The function `program(kind=the first, **options)`: that network as it is exported."""

    def make(kind=KINDS[0], **options):
        size = (8 * kind.patch_size, 16 * kind.patch_size)
        mean, std = MEAN[: kind.in_chans], STD[: kind.in_chans]
        return Program(network(kind, **options), size, mean=mean, std=std, uint8=kind.uint8)

    return make


@pytest.fixture(scope="session")
def example(network, program):
    """The function `example(kind=the first)`: five images, and the network's results, normalised by NumPy."""

    @functools.cache
    def make(kind=KINDS[0]):
        images = given = program(kind).some_images(5)
        if kind.uint8:
            mean, std = np.array(MEAN[: kind.in_chans]), np.array(STD[: kind.in_chans])
            given = ((images / 255 - mean) / std).astype(np.float32)
        return images, np.asarray(jax.jit(lambda model, x: model(x))(network(kind), given))

    return make


@pytest.fixture(scope="session", params=KINDS, ids=str)
def kind(request) -> Kind:
    return request.param
