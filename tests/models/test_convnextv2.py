"""The encoder and classifier: shapes, options, stochastic depth, dtypes, initial weights, errors."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2, Encoder, EncoderConfig
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.layouts import Dense, Gathered, Masked

pytestmark = pytest.mark.usefixtures("compile_quickly")

DEPTHS, DIMS = (1, 1, 2, 1), (4, 6, 8, 10)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shapes(images, **options):
    """Returns the shapes of the logits and of the stage maps, without computing them."""
    config = EncoderConfig(DEPTHS, DIMS, **options)
    model = nnx.eval_shape(lambda: ConvNeXtV2(config, rngs=nnx.Rngs(0)))
    both = jax.eval_shape(lambda m, x: (m(x), m.features(x)), model, images)
    return both[0].shape, [m.shape for m in both[1]]


@pytest.mark.parametrize(
    ("patch_size", "rows", "columns", "channels"), [(1, 5, 1, 1), (2, 2, 3, 5), (4, 1, 1, 3)]
)
def test_shapes(patch_size, rows, columns, channels):
    stride = 8 * patch_size
    images = jnp.zeros((3, stride * rows, stride * columns, channels))
    logits, maps = shapes(images, patch_size=patch_size, in_chans=channels)
    assert logits == (3, 1000)
    assert maps == [(3, rows * 8 >> i, columns * 8 >> i, dim) for i, dim in enumerate(DIMS)]


def test_logits_follow_from_the_last_map(build, error):
    """Mean over positions, LayerNorm, head; with no classes, the same without the head."""
    images = normal(2, 16, 24, 3)
    config = EncoderConfig(DEPTHS, DIMS, patch_size=1)
    model = build(ConvNeXtV2, config, num_classes=7)
    apply = jax.jit(lambda m, x: (m(x), m.pooled(x), m.features(x)[-1]))
    logits, vectors, last = apply(model, images)
    pooled = np.asarray(last, np.float64).mean(axis=(1, 2))
    pooled -= pooled.mean(axis=1, keepdims=True)
    pooled /= np.sqrt((pooled**2).mean(axis=1, keepdims=True) + 1e-6)
    pooled = pooled * np.asarray(model.norm.scale[...]) + np.asarray(model.norm.bias[...])
    assert error(vectors, pooled) < 1e-5
    expected = pooled @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    assert error(logits, expected) < 1e-5

    headless = nnx.eval_shape(lambda: ConvNeXtV2(config, num_classes=0, rngs=nnx.Rngs(0)))
    assert not hasattr(headless, "head")
    nnx.update(headless, {k: v for k, v in nnx.state(model).items() if k != "head"})
    assert error(jax.jit(lambda m, x: m(x))(headless, images), pooled) < 1e-5


def test_block_is_the_formula(build, error):
    """A block on one position and with a delta as depthwise kernel, by hand; GELU exact."""
    block = build(Block, 5, dtype=jnp.float32, seed=3)
    x = normal(1, 1, 1, 5)
    v = np.asarray(x, np.float64)[0, 0, 0]
    get = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731
    y = v * get(block.dwconv.kernel)[3, 3] + get(block.dwconv.bias)
    y = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
    y = y * get(block.norm.scale) + get(block.norm.bias)
    y = y @ get(block.pwconv1.kernel) + get(block.pwconv1.bias)
    y = np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in y])
    norm = np.sqrt(y**2 + 1e-6)
    norm /= norm.mean() + 1e-6
    y = get(block.grn.gamma) * (y * norm) + get(block.grn.beta) + y
    expected = v + y @ get(block.pwconv2.kernel) + get(block.pwconv2.bias)
    assert error(block(x, Dense())[0, 0, 0], expected) < 1e-6


LAYOUTS = {
    "dense": lambda masked: Dense(),
    "masked": lambda masked: Masked.from_mask(masked, 2),
    "gathered": lambda masked: Gathered.from_mask(masked, 3, 2),
}
BOUNDS = {"float32": (1e-6, 1e-5), "float64": (1e-13, 1e-11)}  # of the output, of gradients


@pytest.mark.parametrize(
    ("layout", "dim", "dtype"),  # fewer, as many and more channels than a sample has positions
    [
        ("dense", 5, "float64"),
        ("masked", 5, "float64"),
        ("gathered", 5, "float64"),
        ("gathered", 16, "float64"),
        ("dense", 16, "float32"),
        ("gathered", 16, "float32"),
    ],
)
def test_block_equals_its_readable_form(layout, dim, dtype, build, parameters, error):
    """The fused kernel and the layers of figure 5 give the same output and the same gradients."""
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        block = build(Block, dim, dtype=jnp.dtype(dtype), fill_dtype=np.dtype(dtype))
        masked = jnp.asarray([[[True, False], [False, False]], [[False, False], [True, False]]])
        held = LAYOUTS[layout](masked)
        x = held.enter(jnp.asarray(rng.standard_normal((2, 4, 4, dim)), dtype), 1)
        factor = jnp.asarray([1.25, 0.8], dtype)

        def scalar(block, x, factor, form):
            y = held.leave(form(block, x, held, factor))
            return jnp.sin(y).sum(), y

        differentiate = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        (gradients, *others), y = differentiate(block, x, factor, Block.__call__)
        (expected, *expected_others), expected_y = differentiate(block, x, factor, Block.reference)
        bound, gradient_bound = BOUNDS[dtype]
        assert y.dtype == dtype and error(y, expected_y) < bound
        for a, b in zip(others, expected_others, strict=True):
            assert error(a, b) < gradient_bound
        expected = parameters(expected)
        assert len(expected) == 10
        for name, gradient in parameters(gradients).items():
            assert error(gradient[...], expected[name][...]) < gradient_bound, name


def test_block_without_a_factor(build, error):
    block, x = build(Block, 5, dtype=jnp.float32), normal(2, 4, 6, 5)
    assert error(block(x, Dense()), block.reference(x, Dense())) < 1e-6
    np.testing.assert_array_equal(block(x, Dense()), block(x, Dense(), jnp.ones(2)))


def test_gelu_is_exact(build):
    """The tanh form differs by up to 5e-4: far more than float32 rounding."""
    block = build(Block, 1, dtype=jnp.float32)
    # LayerNorm of one channel gives its bias: what follows is a function of pwconv1's bias alone.
    block.norm.bias[...] = jnp.zeros(1)
    block.grn.gamma[...] = block.grn.beta[...] = jnp.zeros(4)
    block.pwconv2.bias[...] = jnp.zeros(1)
    block.pwconv2.kernel[...] = jnp.asarray([[1.0], [0], [0], [0]])
    apply = jax.jit(lambda block: block(jnp.zeros((1, 1, 1, 1)), Dense())[0, 0, 0, 0])
    for u in np.linspace(-4, 4, 33):
        block.pwconv1.bias[...] = jnp.asarray([u, 0, 0, 0], jnp.float32)
        assert float(apply(block)) == pytest.approx(0.5 * u * (1 + math.erf(u / math.sqrt(2))), abs=1e-6)


# Stochastic depth.


def test_drop_rates_grow_linearly_over_depth():
    config = EncoderConfig((2, 1, 3, 2), DIMS, drop_path=0.35)
    assert config.drop_rates == pytest.approx([0.05 * i for i in range(8)])


def test_factor_multiplies_the_branch_of_its_sample(build, error):
    """0 leaves the input as it is, 1 is no factor at all, and 2.5 scales what the block adds."""
    block = build(Block, 5, dtype=jnp.float32, seed=3)
    x = normal(3, 4, 6, 5)
    found = block(x, Dense(), jnp.asarray([0, 1, 2.5])) - x
    branch = block(x, Dense()) - x
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1], branch[1])
    assert error(found[2], 2.5 * branch[2]) < 1e-6


def test_stochastic_depth_in_the_network(build):
    """Each sample is one of the 16 networks with some of four branches dropped, as often as it should.

    So a draw is per sample and block, kept branches are divided by their rate, and blocks are
    independent; the first block's rate is 0. Without keys nothing is dropped. The candidates are put
    together from the blocks, one after another.
    """
    model = build(Encoder, EncoderConfig(DEPTHS, DIMS, patch_size=1, drop_path=0.6))
    rates = (0, 0.15, 0.3, 0.45, 0.6)
    samples = 512
    one = normal(1, 8, 8, 3)
    images, keys = jnp.tile(one, (samples, 1, 1, 1)), jax.random.split(jax.random.key(0), samples)

    run = jax.jit(lambda m, x, k: m.features(x, k)[-1][:, 0, 0])
    found = np.asarray(run(model, images, keys))
    without_keys = run(model, one, None)

    def network(model, factors):
        x, left = one, iter(factors)
        for stage, (down, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
            x = down[1](down[0](Dense().enter(x, 1))) if stage == 0 else down[1](Dense().patches(down[0](x)))
            for block in blocks:
                x += next(left) * (block(x, Dense()) - x)
        return x[:, 0, 0]

    masks = list(itertools.product((0, 1), repeat=4))
    factors = [[k / (1 - r) for k, r in zip((1, *m), rates, strict=True)] for m in masks]
    apply = jax.jit(network)
    candidates = np.concatenate([np.asarray(apply(model, jnp.asarray(f, jnp.float32))) for f in factors])
    np.testing.assert_allclose(without_keys, apply(model, jnp.ones(5)), atol=1e-5)
    distance = np.abs(found[:, None] - candidates).max(axis=-1)
    assert (np.sort(distance, axis=1)[:, 0] < 1e-4).all()
    assert (np.sort(distance, axis=1)[:, 1] > 1e-3).all()
    frequencies = np.bincount(distance.argmin(axis=1), minlength=16) / samples
    for mask, frequency in zip(masks, frequencies, strict=True):
        share = math.prod(1 - r if k else r for k, r in zip(mask, rates[1:], strict=True))
        assert abs(frequency - share) < 4.5 * math.sqrt(share * (1 - share) / samples), mask


# Initial weights.


def test_initial_weights(parameters):
    """Kernels: truncated normal 0.02; biases and GRN 0; LayerNorm 1 and 0. The blocks start alike."""
    model = ConvNeXtV2(EncoderConfig((1,) * 4, (32,) * 4), num_classes=50, rngs=nnx.Rngs(0))
    seen = []
    for name, variable in parameters(model).items():
        value = np.asarray(variable[...], np.float64)
        match name.split(".")[-1]:
            case "kernel":
                error_of_std = 0.02 / math.sqrt(2 * value.size)
                assert abs(value.std() - 0.02) < 5 * error_of_std, name
                assert abs(value.mean()) < 5 * 0.02 / math.sqrt(value.size), name
                seen.append(value.ravel()[:50])
            case "scale":
                assert (value == 1).all(), name
            case _:
                assert (value == 0).all(), name
    assert len(np.unique(seen, axis=0)) == len(seen), "no two kernels are from the same key"


def test_head_init_scale():
    def head(scale):
        config = EncoderConfig((1,) * 4, (2,) * 4, patch_size=1)
        options = {"num_classes": 5, "head_init_scale": scale}
        make = lambda: ConvNeXtV2(config, rngs=nnx.Rngs(3), **options)  # noqa: E731
        return jax.jit(lambda: make().head.kernel[...])()

    np.testing.assert_allclose(head(0.001), 0.001 * head(1.0), rtol=1e-6)
    assert np.abs(head(1.0)).max() > 0.01


# Dtypes.


def test_bfloat16_tracks_float32(build, parameters, error):
    images = normal(2, 32, 32, 3)
    config = EncoderConfig(DEPTHS, (16, 24, 32, 40), patch_size=2)
    narrow = build(ConvNeXtV2, dataclasses.replace(config, dtype=jnp.bfloat16), num_classes=7)
    wide = build(ConvNeXtV2, config, num_classes=7)
    assert {v.dtype for v in parameters(narrow).values()} == {jnp.dtype("float32")}
    apply = jax.jit(lambda m, x: (m(x), m.features(x)))
    logits, maps = apply(narrow, images)
    expected, expected_maps = apply(wide, images)
    assert logits.dtype == expected.dtype == jnp.float32
    assert {m.dtype for m in maps} == {jnp.dtype("bfloat16")}
    assert {m.dtype for m in expected_maps} == {jnp.dtype("float32")}
    for a, b in zip([logits, *maps], [expected, *expected_maps], strict=True):
        assert 0 < error(a.astype(jnp.float32), b) < 0.03


# Errors.


@pytest.mark.parametrize(
    ("height", "width", "near"), [(30, 32, "32x32"), (32, 50, "32x48"), (3, 16, "16x16")]
)
def test_size_must_be_a_multiple_of_the_stride(height, width, near):
    with pytest.raises(UserError) as raised:
        shapes(jnp.zeros((1, height, width, 3)), patch_size=2)
    message = str(raised.value)
    assert f"{height}x{width}" in message and "stride 16" in message and near in message


def test_channels_must_match():
    with pytest.raises(UserError, match="4 channels, the model takes 3"):
        shapes(jnp.zeros((1, 8, 8, 4)), patch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size 3"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"drop_path": -0.1}, "drop_path -0.1"),
        ({"in_chans": 0}, "in_chans 0"),
        ({"remat": "blok"}, "'blok'; did you mean 'block'"),
        ({"depths": (1, 1, 1)}, r"depths \(1, 1, 1\)"),
        ({"dims": (1, 1, 0, 1)}, r"dims \(1, 1, 0, 1\)"),
    ],
)
def test_impossible_options(options, message):
    arguments = {"depths": DEPTHS, "dims": DIMS} | options
    with pytest.raises(UserError, match=message):
        EncoderConfig(**arguments)


def test_the_encoder_keeps_its_options():
    """They are hashable, so two models with equal options have equal graphs: one compilation serves both."""
    config = EncoderConfig(DEPTHS, DIMS, patch_size=2, drop_path=0.1)
    same = EncoderConfig(DEPTHS, DIMS, patch_size=2, drop_path=0.1)
    other = dataclasses.replace(config, drop_path=0.2)
    models = [nnx.eval_shape(lambda c=c: Encoder(c, rngs=nnx.Rngs(0))) for c in (config, same, other)]
    assert models[0].config is config and models[0].stride == 16
    graphs = [nnx.graphdef(model) for model in models]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])
    assert graphs[0] != graphs[2]
