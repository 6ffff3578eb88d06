"""BatchNorm: its formula, its dtypes, and one global batch over eight devices; tests/parity has torch's."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.models.layers import BatchNorm

ROOT = Path(__file__).resolve().parents[2]


def test_formula(random_params, error):
    """Biased variance normalises, the unbiased one is averaged; one position and any shape will do."""
    layer = random_params(BatchNorm(3, dtype=jnp.float32), 0)
    x = 1 + 2 * np.random.default_rng(0).standard_normal((7, 4, 3))
    y = layer(jnp.asarray(x, jnp.float32), train=True)
    normal = (x - x.mean(axis=(0, 1))) / np.sqrt(x.var(axis=(0, 1)) + 1e-5)
    assert error(y, normal * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])) < 1e-5
    assert error(layer.mean[...], 0.1 * x.mean(axis=(0, 1))) < 1e-5
    assert error(layer.var[...], 0.9 + 0.1 * x.var(axis=(0, 1), ddof=1)) < 1e-5


def test_variables_are_told_apart():
    layer = BatchNorm(3, dtype=jnp.float32)
    assert set(nnx.state(layer, nnx.Param)) == {"scale", "bias"}
    assert set(nnx.state(layer, nnx.BatchStat)) == {"mean", "var"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_input_has_float32_statistics(dtype, error):
    """Sums of squares would overflow float16, and bfloat16 would lose the small deviation on a large mean."""
    x = (300 + 2 * np.random.default_rng(0).standard_normal((4, 32, 32, 2))).astype(np.float32)
    x = jnp.asarray(x, dtype)
    layer = BatchNorm(2, dtype=dtype)
    y = layer(x, train=True)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    expected = (exact - exact.mean(axis=(0, 1, 2))) / np.sqrt(exact.var(axis=(0, 1, 2)) + 1e-5)
    assert y.dtype == dtype and layer.var[...].dtype == jnp.float32
    assert error(y.astype(jnp.float32), expected) < 2**-7
    assert error(layer.mean[...], 0.1 * exact.mean(axis=(0, 1, 2))) < 1e-5


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from cnx2_jax.models.layers import BatchNorm

assert jax.device_count() == 8
rng = np.random.default_rng(0)
# Every device's part has other statistics.
x = jnp.asarray(rng.standard_normal((16, 3, 2, 4)) + np.arange(16).reshape(16, 1, 1, 1), jnp.float32)
weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
layer = BatchNorm(4, dtype=jnp.float32)
layer.scale[...], layer.bias[...] = (jnp.asarray(rng.standard_normal(4), jnp.float32) for _ in range(2))
graph, params, statistics = nnx.split(layer, nnx.Param, nnx.BatchStat)

def step(params, statistics, x, weights):
    def scalar(params, x):
        model = nnx.merge(graph, params, statistics, copy=True)
        y = model(x, train=True)
        return (weights * y).sum(), (y, nnx.state(model, nnx.BatchStat))
    (to_params, to_x), (y, statistics) = jax.grad(scalar, argnums=(0, 1), has_aux=True)(params, x)
    return to_params, to_x, y, statistics

def on_each(*arguments):
    to_params, *others = step(*arguments)
    return jax.lax.psum(to_params, ("data", "fsdp")), *others

expected = jax.jit(step)(params, statistics, x, weights)
automatic = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)  # as in training
split = P(("data", "fsdp"))
manual = jax.shard_map(
    on_each, mesh=automatic, in_specs=(P(), P(), split, split), out_specs=(P(), split, split, P()),
    check_vma=False,
)
for function, name in ((manual, "shard_map"), (step, "global arrays")):
    place = lambda spec: jax.NamedSharding(automatic, spec)
    arguments = jax.device_put((params, statistics, x, weights), tuple(map(place, (P(), P(), split, split))))
    found = jax.jit(function)(*arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
print("same")
"""


def test_eight_devices_equal_one():
    """Output, gradients and running averages, with the batch split by `shard_map` and by the compiler."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
