"""Shared by all tests: JAX on the CPU, shape annotations checked, deterministic weights."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

# Before anything imports the models: every shape annotation there is checked at each call and trace.
install_import_hook(["cnx2_jax.models", "cnx2_jax.kernels"], "beartype.beartype")

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


def parameter_paths(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns the parameters by dotted path, such as `stages.0.1.dwconv.kernel`, in sorted order."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return dict(sorted((".".join(map(str, path)), variable) for path, variable in flat))


def random_value(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws one parameter in float64. Nothing is zero or one, and activations stay near 1 in size."""
    noise = rng.standard_normal(shape)
    match name.split(".")[-1]:
        case "kernel" if len(shape) == 3:  # depthwise: [rows, columns, channels]
            return noise / math.sqrt(shape[0] * shape[1])
        case "kernel":  # [..., in, out]
            return noise / math.sqrt(math.prod(shape[:-1]))
        case "scale":
            return 1 + 0.2 * noise
        case "gamma" | "mask_token":
            return 0.5 * noise
    return 0.2 * noise  # biases and GRN's beta


def fill_randomly(model: nnx.Module, seed: int, dtype=np.float32) -> nnx.Module:
    """Fills every parameter of `model`, in sorted path order from one generator, and returns it.

    The stored arrays of tests/golden depend on this rule; make_golden.py writes them anew. A model from
    `nnx.eval_shape` does too: then nothing is initialised in vain.
    """
    rng = np.random.default_rng(seed)
    values = {
        name: random_value(name, variable.shape, rng)
        for name, variable in parameter_paths(model).items()
    }
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    filled = [
        (path, variable.replace(jnp.asarray(values[".".join(map(str, path))].astype(dtype))))
        for path, variable in flat
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


@pytest.fixture
def random_params():
    """The function `fill_randomly(model, seed, dtype=float32)`."""
    return fill_randomly


@pytest.fixture
def parameters():
    """The function `parameter_paths(model)`."""
    return parameter_paths


def relative_error(actual, expected) -> float:
    """Largest absolute difference over the largest absolute expected value; NaN where shapes differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture
def error():
    """The function `relative_error(actual, expected)`."""
    return relative_error
