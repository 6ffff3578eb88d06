"""Shared by all tests: JAX on the CPU, shape annotations checked, deterministic weights."""

# ruff: noqa: E402 - the environment and the hook must be there before the imports

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, the others and the processes that they start need not compile again.
_compiled = tempfile.TemporaryDirectory(prefix="cnx2-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from jaxtyping import install_import_hook

# Before anything imports the models: every shape annotation there is checked at each call and trace.
install_import_hook(["cnx2_jax.models", "cnx2_jax.kernels"], "beartype.beartype")

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src import compiler

from cnx2_jax.kernels.rows import Windows
from cnx2_jax.models import create_model
from cnx2_jax.observe import progress


def admit_placeholders(kind: type) -> None:
    """Lets a checked dataclass hold `object()` for arrays.

    JAX rebuilds the arguments of every `custom_vjp` like that when it differentiates, to see their
    structure; the check of annotations knows nothing of it. All else is checked as before.
    """
    checked = kind.__init__

    def init(self, *arguments, **fields):
        if any(type(value) is object for value in fields.values()):  # JAX gives all by name
            for name, value in fields.items():
                object.__setattr__(self, name, value)
        else:
            checked(self, *arguments, **fields)

    kind.__init__ = init


admit_placeholders(Windows)


def pytest_xdist_auto_num_workers():
    """One more than there are cores, because tests that start processes often wait for them."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Moves files with long tests to the front, so that no worker is left alone with one at the end."""
    ranks = {}
    for item in items:
        rank = 0 if item.get_closest_marker("processes") else 1 if item.get_closest_marker("slow") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


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
        name: random_value(name, variable.shape, rng) for name, variable in parameter_paths(model).items()
    }
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    filled = [
        (path, variable.replace(jnp.asarray(values[".".join(map(str, path))].astype(dtype))))
        for path, variable in flat
    ]
    nnx.update(model, nnx.from_flat_state(filled))
    return model


# Most of the time of a small program's compilation goes into the emitters of fusions, at any level. JAX 0.11
# and newer always use them and abort at this flag.
QUICK_FLAGS = ["xla_cpu_use_fusion_emitters"] if jax.version.__version_info__ < (0, 11) else []
QUICK_ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}=false" for name in QUICK_FLAGS),
}


@pytest.fixture(scope="module")
def compile_quickly():
    """Leaves out what XLA optimises, where nothing runs long enough to earn back what that takes.

    In this process and in those that tests start, because results are compared between them.
    """
    get_options = compiler.get_compile_options

    def get_quick_options(*arguments, backend, **options):
        found = get_options(*arguments, backend=backend, **options)
        if backend.platform == "cpu":
            found.env_option_overrides = [
                *found.env_option_overrides,
                *((name, False) for name in QUICK_FLAGS),
            ]
        return found

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        # JAX has no setting for the flag, and this process has read XLA_FLAGS already.
        patch.setattr(compiler, "get_compile_options", get_quick_options)
        for name, value in QUICK_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def no_progress_lines(monkeypatch):
    """On a busy machine a command may take so long that it reports progress, and what it says is compared."""
    monkeypatch.setattr(progress, "LINE_SECONDS", float("inf"))


@pytest.fixture(scope="session")
def random_params():
    """The function `fill_randomly(model, seed, dtype=float32)`."""
    return fill_randomly


@pytest.fixture(scope="session")
def parameters():
    """The function `parameter_paths(model)`."""
    return parameter_paths


def build_randomly(kind, *arguments, seed: int = 0, fill_dtype=np.float32, **options) -> nnx.Module:
    """Builds `kind(*arguments, **options)` without initialising it, and fills it by `fill_randomly`.

    Much faster than an eager initialisation, which compiles a sampler for every shape. Running averages are
    filled too, variances above zero.
    """
    model = nnx.eval_shape(lambda: kind(*arguments, rngs=nnx.Rngs(0), **options))
    fill_randomly(model, seed, fill_dtype)
    rng = np.random.default_rng([seed, 1])  # another generator, or parameters would depend on these
    averages = []
    statistics = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    for path, variable in sorted(statistics, key=lambda item: ".".join(map(str, item[0]))):
        noise = 0.3 * rng.standard_normal(variable.shape)
        value = np.exp(noise) if path[-1] == "var" else noise
        averages.append((path, variable.replace(jnp.asarray(value.astype(fill_dtype)))))
    nnx.update(model, nnx.from_flat_state(averages))
    return model


@pytest.fixture(scope="session")
def build():
    """The function `build_randomly(kind, *arguments, seed=0, fill_dtype=float32, **options)`."""
    return build_randomly


def relative_error(actual, expected) -> float:
    """Largest absolute difference over the largest absolute expected value; fails on another shape."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def error():
    """The function `relative_error(actual, expected)`."""
    return relative_error


@dataclasses.dataclass(frozen=True)
class Reference:
    """A network that is compared with Hugging Face's, by tests/parity and by tests/golden."""

    variant: str
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.variant}_{self.height}x{self.width}"

    @property
    def golden(self) -> Path:
        """Where make_golden.py keeps what Hugging Face's model gives."""
        return Path(__file__).parent / "golden" / f"{self}.npz"

    def model(self):
        """The network, with weights by `fill_randomly`."""
        create = functools.partial(create_model, f"convnextv2_{self.variant}")
        return build_randomly(create, seed=1)

    def images(self) -> np.ndarray:
        """Two images `[2, H, W, 3]`: squares of colour and noise, the second of less contrast."""
        rng = np.random.default_rng(2)
        noise = rng.standard_normal((2, self.height, self.width, 3))
        squares = rng.standard_normal((2, self.height // 32, self.width // 32, 3))
        images = 0.5 * noise + squares.repeat(32, axis=1).repeat(32, axis=2)
        return (images * np.array([1, 0.3]).reshape(2, 1, 1, 1)).astype(np.float32)

    @functools.cache  # noqa: B019 - four small results, for the whole session
    def outputs(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """This package's logits and stage maps."""
        apply = jax.jit(lambda model, x: (model(x), model.features(x)))
        logits, maps = apply(self.model(), jnp.asarray(self.images()))
        return np.asarray(logits), [np.asarray(x) for x in maps]

    @staticmethod
    def stored(logits: np.ndarray, maps: list[np.ndarray]) -> dict[str, np.ndarray]:
        """What is kept of outputs: the logits, and some positions and channels of every map."""
        steps = (14, 7, 4, 2)
        samples = {
            f"stage{i}": x[:, ::step, ::step, ::5]
            for i, (x, step) in enumerate(zip(maps, steps, strict=True))
        }
        return {"logits": logits, **samples}


REFERENCES = [
    Reference("atto", 224, 224),
    Reference("atto", 160, 224),
    Reference("tiny", 224, 224),
    Reference("tiny", 224, 160),
]


@pytest.fixture(scope="session", params=REFERENCES, ids=str)
def reference(request) -> Reference:
    """Each of the networks that are compared with Hugging Face's."""
    return request.param


@dataclasses.dataclass(frozen=True)
class UperNetReference(Reference):
    """The same for UperNet: two images, and the logits of both heads."""

    def __str__(self) -> str:
        return f"upernet_{super().__str__()}"

    def model(self):
        """The network, with weights and running averages by `build_randomly`."""
        create = functools.partial(create_model, f"upernet_{self.variant}")
        return build_randomly(create, num_classes=150, seed=1)

    @functools.cache  # noqa: B019 - two small results, for the whole session
    def outputs(self) -> tuple[np.ndarray, ...]:
        """This package's logits of both heads."""
        found = jax.jit(lambda model, x: model(x))(self.model(), jnp.asarray(self.images()))
        return tuple(map(np.asarray, found))

    @staticmethod
    def stored(main: np.ndarray, auxiliary: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the positions and classes of the outputs that are stored."""
        return {"main": main[:, ::3, ::3, ::5], "auxiliary": auxiliary[..., ::5]}


UPERNET_REFERENCES = [UperNetReference("atto", 64, 96), UperNetReference("tiny", 64, 64)]


@pytest.fixture(scope="session", params=UPERNET_REFERENCES, ids=str)
def upernet_reference(request) -> UperNetReference:
    """Each of the UperNets that are compared with Hugging Face's."""
    return request.param
