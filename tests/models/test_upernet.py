"""UperNet: its options, sizes, dtypes, random draws and devices; tests/parity compares it with PyTorch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.models import VARIANTS, EncoderConfig, UperNet, create_model
from cnx2_jax.models.layers import dropout_channels
from cnx2_jax.models.state import split
from cnx2_jax.models.upernet import Conv, ConvModule

ROOT = Path(__file__).resolve().parents[2]

# Parameter counts of transformers' UperNetForSemanticSegmentation with 150 classes.
PARAMETERS = {
    "atto": 32_110_436,
    "femto": 34_099_772,
    "pico": 38_861_804,
    "nano": 46_348_316,
    "tiny": 60_289_004,
    "small": 81_971_948,
    "base": 122_229_292,
    "large": 235_184_300,
    "huge": 706_807_020,
}

pytestmark = pytest.mark.usefixtures("compile_quickly")

HEADS = {"num_classes": 5, "channels": 12, "auxiliary_channels": 8, "pool_scales": (1, 3)}


@pytest.fixture
def quickly_compiled(monkeypatch):
    """The convolutions of TPUs and GPUs, which compile faster."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))


@jax.jit
def run(model, x, keys=None):
    """Traced once for all tests that give it equal models; all of them are `quickly_compiled`."""
    return model(x, keys)


def small(build, **options):
    heads = {name: options.pop(name, value) for name, value in {**HEADS, "dropout": 0.1}.items()}
    return build(UperNet, EncoderConfig((1, 1, 2, 1), (4, 6, 8, 10), **options), **heads)


def images(*size, count=2):
    return jnp.asarray(np.random.default_rng(0).standard_normal((count, *size, 3)), jnp.float32)


def test_outputs_are_those_of_hugging_face(upernet_reference, error):
    """Some logits of both heads, within the bound that tests/parity has."""
    with np.load(upernet_reference.golden) as golden:
        found = upernet_reference.stored(*upernet_reference.outputs())
        assert found.keys() == set(golden)
        for name, array in found.items():
            assert 0.1 < golden[name].std() < 10, "the comparison could not fail"
            assert error(array, golden[name]) < 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, parameters):
    """Parameters as in transformers; nothing is computed."""
    model = nnx.eval_shape(lambda: create_model(f"upernet_{variant}", num_classes=150, rngs=nnx.Rngs(0)))
    assert sum(math.prod(p.shape) for p in parameters(model).values()) == PARAMETERS[variant]


def test_shapes_of_the_results():
    model = nnx.eval_shape(lambda: create_model("upernet_atto", num_classes=150, rngs=nnx.Rngs(0)))
    found = nnx.eval_shape(lambda model, x: (*model(x), model.segment(x)), model, images(64, 96))
    assert [x.shape for x in found] == [(2, 16, 24, 150), (2, 4, 6, 150), (2, 64, 96, 150)]
    assert {x.dtype for x in found} == {jnp.dtype("float32")}


def test_a_convolution_of_several_maps_is_that_of_their_concatenation(build, error):
    """Also where a map is enlarged by no whole factor, or made smaller; the value and all gradients."""
    maps = [
        np.random.default_rng(i).standard_normal((2, *s, 3))
        for i, s in enumerate([(6, 8), (3, 4), (6, 8), (1, 1), (4, 3), (7, 9)])
    ]
    with jax.enable_x64(True):
        for size in (1, 3):
            layer = build(Conv, size, 18, 5, dtype=jnp.float64, fill_dtype=np.float64)

            def together(maps, kernel):
                resized = [jax.image.resize(x, (2, 6, 8, 3), "linear", antialias=False) for x in maps]
                return jax.lax.conv_general_dilated(
                    jnp.concatenate(resized, axis=-1),
                    kernel,
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )

            def ours(maps, kernel, graph=split(layer)[0]):  # noqa: B008
                return nnx.merge(graph, nnx.from_flat_state({("kernel",): kernel}))(*maps)

            weights = np.random.default_rng(9).standard_normal((2, 6, 8, 5))
            results = []
            for function in (ours, together):
                y, backward = jax.vjp(function, [jnp.asarray(x) for x in maps], layer.kernel[...])
                results.append(jax.tree.leaves((y, backward(jnp.asarray(weights)))))
            for found, expected in zip(*results, strict=True):
                assert error(found, expected) < 1e-12


def test_initial_weights():
    """As in mmsegmentation: kaiming by fan_out, BatchNorm 1 and 0, classifiers 0.01 and 0."""
    module = ConvModule(3, 64, 128, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert float(module.conv.kernel[...].std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    model = UperNet(EncoderConfig((1, 1, 1, 1), (4, 4, 4, 4)), num_classes=50, channels=64, rngs=nnx.Rngs(0))
    for head in (model.decode_head, model.auxiliary_head):
        assert float(head.conv_seg.kernel[...].std()) == pytest.approx(0.01, rel=0.05)
        assert not head.conv_seg.bias[...].any()
    assert (module.bn.scale[...] == 1).all() and not module.bn.bias[...].any()


def test_bfloat16_is_close_to_float32(build, error, quickly_compiled):
    wide = run(small(build), images(64, 64))
    narrow = run(small(build, dtype=jnp.bfloat16), images(64, 64))
    for found, expected in zip(narrow, wide, strict=True):
        assert found.dtype == jnp.float32
        assert 0 < error(found, expected) < 0.05


@pytest.mark.slow
def test_remat_and_scan_change_nothing(build, error, quickly_compiled):
    """With stochastic depth and dropout, in training: the results and a gradient through all blocks."""
    keys = jax.random.split(jax.random.key(0), 2)

    def gradient(graph, arrays, x):
        def scalar(x):
            logits = nnx.merge(graph, arrays, copy=True)(x, keys, train=True)
            return sum(jnp.sin(y).sum() for y in logits), logits

        return jax.grad(scalar, has_aux=True)(x)

    results = []
    for remat, scan in (("none", True), ("block", False)):
        graph, arrays = nnx.split(small(build, drop_path=0.4, remat=remat, scan=scan))
        results.append(jax.jit(gradient, static_argnums=0)(graph, arrays, images(64, 64)))
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        assert error(found, expected) < 1e-5


def test_dropout_drops_channels():
    """A share of the channels is zero at all positions, the others are scaled up, per sample."""
    keys = jax.random.split(jax.random.key(0), 50)
    y = np.asarray(dropout_channels(jnp.ones((50, 3, 2, 200)), keys, 0.1, 7))
    assert (y == y[:, :1, :1]).all()
    assert set(np.unique(y)) == {0, np.float32(1 / 0.9)}
    assert (y == 0).mean() == pytest.approx(0.1, abs=4.5 * math.sqrt(0.1 * 0.9 / 10_000))
    assert len({sample.tobytes() for sample in y}) == 50
    assert (np.asarray(dropout_channels(jnp.ones((50, 3, 2, 200)), keys, 0.1, 8)) != y).any()
    alone = dropout_channels(jnp.ones((1, 3, 2, 200)), keys[7:8], 0.1, 7)
    np.testing.assert_array_equal(alone[0], y[7])  # whatever batch it is in


def test_only_keys_switch_dropout_on(build, quickly_compiled):
    """Both heads draw; no keys, or rate 0, is the plain network."""
    x, keys = images(64, 64), jax.random.split(jax.random.key(0), 2)
    model = small(build)
    plain, dropped = run(model, x), run(model, x, keys)
    assert all((a != b).any() for a, b in zip(plain, dropped, strict=True))
    off = run(small(build, dropout=0.0), x, keys)
    for a, b in zip(plain, off, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_only_training_changes_the_running_averages(build, quickly_compiled):
    model = small(build)
    before = {name: np.array(value) for name, value in split(model)[1].items()}
    averages = {name for name in before if name.endswith((".mean", ".var"))}
    assert len(averages) == 2 * (2 + 1 + 3 + 3 + 1 + 1)

    def arrays_after(model, x, train):
        model(x, train=train)
        return split(model)[1]

    for train in (False, True):
        arrays = jax.jit(arrays_after, static_argnums=2)(model, images(64, 64), train)
        changed = {name for name, value in arrays.items() if (value != before[name]).any()}
        assert changed == (averages if train else set())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes 0 of UperNet must be at least 1"),
        ({"channels": 0}, "channels 0"),
        ({"auxiliary_channels": -1}, "auxiliary_channels -1"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and less than 1"),
        ({"pool_scales": ()}, r"pool_scales \(\) must be positive"),
        ({"pool_scales": (1, 0)}, r"pool_scales \(1, 0\) must be positive"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        create_model("upernet_atto", rngs=nnx.Rngs(0), **{"num_classes": 2, **options})


def test_images_that_do_not_fit(build):
    with pytest.raises(UserError, match="image size 64x48 is not a multiple of the stride 32"):
        small(build).segment(images(64, 48))


EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from cnx2_jax.models import EncoderConfig, UperNet
from cnx2_jax.models.state import merge, parameters, split, variables

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
# The forms of TPUs and GPUs compile faster.
jax.lax.platform_dependent = lambda *arrays, default, **_: default(*arrays)
jax.config.update("jax_enable_x64", True)
config = EncoderConfig((1, 1, 1, 1), (4, 6, 8, 10), drop_path=0.3, dtype=jnp.float64)
options = dict(num_classes=5, channels=12, auxiliary_channels=8, pool_scales=(1, 3), dropout=0.3)
model = nnx.eval_shape(lambda: UperNet(config, **options, rngs=nnx.Rngs(0)))
rng = np.random.default_rng(0)

def filled(arrays):
    return {name: jnp.asarray(abs(rng.standard_normal(a.shape)) / 2 + 0.1) for name, a in arrays.items()}

graph, params, statistics = split(model)[0], filled(parameters(model)), filled(variables(model))
x = jnp.asarray(rng.standard_normal((8, 32, 64, 3)) + np.arange(8).reshape(8, 1, 1, 1) / 4)
keys = jax.random.split(jax.random.key(0), 8)

def step(params, statistics, x, keys):
    def scalar(params):
        model = merge(graph, {**params, **statistics})
        logits = model(x, keys, train=True)
        return sum(jnp.sin(y).sum() for y in logits), (logits, variables(model))
    return jax.grad(scalar, has_aux=True)(params)

def on_each(*arguments):
    gradients, others = step(*arguments)
    return jax.lax.psum(gradients, "data"), others

expected = jax.jit(step)(params, statistics, x, keys)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split_batch = P("data")
manual = jax.shard_map(
    on_each, mesh=mesh, in_specs=(P(), P(), split_batch, split_batch),
    out_specs=(P(), (split_batch, P())), check_vma=False,
)
found = jax.jit(manual)(params, statistics, x, keys)
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    # A 1x1 convolution and BatchNorm follow these alone: their gradients are zero but for rounding.
    if not any(name in str(path) for name in ("norm0.bias", "norm1.bias")):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max(), err_msg=str(path))
print("same")
"""


@pytest.mark.slow
def test_eight_devices_equal_one():
    """Logits with dropout and stochastic depth, gradients and running averages."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"]
