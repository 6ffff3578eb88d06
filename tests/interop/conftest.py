"""Parameters that take little time and memory, as the layouts see no values."""

import numpy as np
import pytest
from flax import nnx

from cnx2_jax.models import FCMAE, ConvNeXtV2

SMALL = ((1, 2, 1, 1), (8, 16, 24, 40))


def numbered(build) -> dict[str, np.ndarray]:
    """Returns the parameters of `build()` by our names: bytes that count up, each from another start."""
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    pool = np.arange(251, dtype=np.uint8)
    return {
        ".".join(map(str, path)): np.resize(np.roll(pool, index), leaf.shape)
        for index, (path, leaf) in enumerate(state)
    }


def named(kind, **options) -> dict[str, np.ndarray]:
    return numbered(lambda: kind(*SMALL, rngs=nnx.Rngs(0), **options))


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
    """The same without a head."""
    return named(ConvNeXtV2, num_classes=0)


@pytest.fixture
def small_fcmae():
    """Parameters of a small FCMAE."""
    return named(FCMAE, decoder_dim=12, decoder_depth=2)
