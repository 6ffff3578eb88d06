"""The depthwise convolution against XLA's grouped convolution and against a literal sum."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.kernels import depthwise
from cnx2_jax.kernels.depthwise import depthwise_conv

# Map height and width, kernel height and width.
SIZES = [
    (9, 8, 3, 3),
    (8, 9, 5, 5),
    (10, 11, 7, 7),
    (6, 7, 4, 4),
    (7, 6, 2, 6),
    (6, 9, 7, 1),
    (1, 1, 7, 7),
    (2, 3, 7, 7),
    (2, 3, 4, 4),
    (1, 12, 7, 7),
]


@pytest.fixture(params=["cpu", "cuda", "other"])
def platform(request, monkeypatch):
    """Runs a test with the CPU's form and with the forms of the other platforms, all on the CPU."""
    if request.param != "cpu":
        choose = lambda *arrays, default, **forms: forms.get(request.param, default)(*arrays)  # noqa: E731
        monkeypatch.setattr(depthwise.lax, "platform_dependent", choose)
    return request.param


def arrays(size, dtype=jnp.float32, batch=2, channels=5):
    """Returns an image, a kernel and a gradient of the output."""
    height, width, *kernel = size
    rng = np.random.default_rng(sum(size))
    shapes = [
        (batch, height, width, channels),
        (*kernel, channels),
        (batch, height, width, channels),
    ]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def reference(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision="highest",
    )


def with_gradients(function, *arrays):
    """Returns the output and both gradients; compiled as one, anew at each call."""

    def apply(x, kernel, gradient):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(gradient)

    return jax.jit(apply)(*arrays)


def literal(x, kernel):
    """The sum as a textbook has it, in float64."""
    _, height, width, _ = x.shape
    rows, columns, _ = kernel.shape
    y = np.zeros(x.shape)
    for r in range(height):
        for c in range(width):
            for i in range(rows):
                for j in range(columns):
                    row, column = r + i - (rows - 1) // 2, c + j - (columns - 1) // 2
                    if 0 <= row < height and 0 <= column < width:
                        y[:, r, c] += x[:, row, column] * kernel[i, j]
    return y


@pytest.mark.parametrize("size", SIZES)
def test_equals_grouped_convolution(size, platform, error):
    data = arrays(size)
    found = with_gradients(depthwise_conv, *data)
    expected = with_gradients(reference, *data)
    for name, a, b in zip(("y", "x", "kernel"), found, expected, strict=True):
        assert a.dtype == b.dtype and error(a, b) < 1e-6, name


@pytest.mark.parametrize("size", SIZES[:4])
def test_bfloat16_is_float32_rounded_once(size, platform):
    """Sums are float32: the result differs from the float32 one by no more than its own rounding."""
    data = arrays(size, jnp.bfloat16, batch=4)
    found = with_gradients(depthwise_conv, *data)
    expected = with_gradients(reference, *(a.astype(jnp.float32) for a in data))
    # Half a unit in the last of 8 binary digits; the CPU stands in badly for others' accumulators.
    rounding = 2**-8 if platform == "cpu" else 2**-5
    for name, a, b in zip(("y", "x", "kernel"), found, expected, strict=True):
        assert a.dtype == jnp.bfloat16, name
        scale = np.abs(b).max()
        np.testing.assert_allclose(
            a.astype(jnp.float32) / scale, b / scale, rtol=rounding, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("size", [(5, 4, 7, 7), (4, 6, 3, 3), (5, 5, 4, 2), (1, 2, 7, 7)])
def test_float64_against_literal_sum_and_differences(size, platform, error):
    """Forward against the literal sum; both gradients against central differences of it, everywhere.

    The sum is linear in each argument, so differences have no error but rounding.
    """
    with jax.enable_x64(True):
        data = arrays(size, jnp.float64, channels=2)
        found = with_gradients(depthwise_conv, *data)
        assert all(a.dtype == jnp.float64 for a in found)
    x, kernel, gradient = (np.array(a) for a in data)
    assert error(found[0], literal(x, kernel)) < 1e-13
    for array, result in ((x, found[1]), (kernel, found[2])):
        differences = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            values = []
            for step in (0.5, -0.5):
                old = array[index]
                array[index] = old + step
                values.append((literal(x, kernel) * gradient).sum())
                array[index] = old
            differences[index] = values[0] - values[1]
        assert error(result, differences) < 1e-12


def test_jit_and_vmap(error):
    data = [jnp.stack([a, 2 * a, a - 1]) for a in arrays((5, 6, 7, 7))]
    apply = lambda *one: with_gradients(depthwise_conv, *one)  # noqa: E731
    found = jax.jit(jax.vmap(apply))(*data)
    expected = [apply(*(a[i] for a in data)) for i in range(3)]
    for a, b in zip(found, zip(*expected, strict=True), strict=True):
        assert error(a, jnp.stack(b)) < 1e-6


def test_vmap_over_images_alone(error):
    x, kernel, _ = arrays((5, 6, 7, 7))
    found = jax.vmap(depthwise_conv, in_axes=(0, None))(jnp.stack([x, 3 * x]), kernel)
    assert error(found, jnp.stack([reference(x, kernel), reference(3 * x, kernel)])) < 1e-6


@pytest.mark.parametrize(("platform_name", "convolutions"), [("cpu", 0), ("tpu", 3), ("cuda", 3)])
def test_form_of_each_platform(platform_name, convolutions):
    """Lowered for the CPU there is no convolution; elsewhere the output and each gradient are one."""
    data = arrays((8, 8, 7, 7))
    traced = jax.jit(lambda *a: with_gradients(depthwise_conv, *a)).trace(*data)
    text = traced.lower(lowering_platforms=(platform_name,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from cnx2_jax.kernels.depthwise import depthwise_conv

assert jax.device_count() == 4
rng = np.random.default_rng(0)
x, g = (jnp.asarray(rng.standard_normal((8, 6, 5, 3)), jnp.float32) for _ in range(2))
k = jnp.asarray(rng.standard_normal((7, 7, 3)), jnp.float32)

@jax.jit
def apply(x, k, g):
    y, pull = jax.vjp(depthwise_conv, x, k)
    return y, *pull(g)

alone = apply(x, k, g)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))  # as the training loop's
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
inputs = jax.device_put((x, k, g), (split, whole, split))
sharded = jax.jit(apply, out_shardings=(split, split, whole))(*inputs)
for a, b in zip(alone, sharded):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
y = jax.jit(depthwise_conv)(*inputs[:2])
assert {s.data.shape for s in y.addressable_shards} == {(2, 6, 5, 3)}, y.sharding
print("same")
"""


def test_batch_split_over_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
