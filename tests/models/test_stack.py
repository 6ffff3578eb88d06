"""Scanned and unrolled stacks give the same, with every remat policy; what each costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.kernels import depthwise
from cnx2_jax.models import FCMAE, ConvNeXtV2, Encoder, EncoderConfig
from cnx2_jax.models.convnextv2 import Block
from cnx2_jax.models.layouts import Dense, Gathered, Masked
from cnx2_jax.models.stack import REMAT, run_blocks

pytestmark = pytest.mark.usefixtures("compile_quickly")

DIMS = (4, 6, 8, 10)
MASKED = np.array([[[False, True], [True, False]], [[False, False], [True, True]]])


@pytest.fixture
def quickly_compiled(monkeypatch):
    """The depthwise convolution of TPUs and GPUs, which compiles faster."""
    choose = lambda *arrays, default, **_: default(*arrays)  # noqa: E731
    monkeypatch.setattr(depthwise.lax, "platform_dependent", choose)


def stack(depth, dim=5, dtype=jnp.float32):
    """A `kind` for `build`: some blocks."""
    return lambda rngs: nnx.List([Block(dim, dtype=dtype, rngs=rngs) for _ in range(depth)])


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})(*arguments)


def with_gradients(run, blocks, x, factors):
    """The result of `run` and gradients of a scalar of it in the parameters, the map and the factors."""

    def scalar(blocks, x, factors):
        y = run(blocks, x, factors)
        return jnp.sin(y).sum(), y

    return compiled(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True), blocks, x, factors)


@pytest.mark.parametrize("kind", [Dense, Masked, Gathered])
def test_scan_and_remat_change_nothing(kind, build, error, quickly_compiled):
    """Against blocks called one after another, in float64: the result and every gradient, factors' too.

    With every policy where a layout holds most, and otherwise once scanned and once unrolled.
    """
    ways = [(remat, scan) for remat in REMAT for scan in (False, True)]
    ways = ways if kind is Gathered else [("block", False), ("dots", True)]
    factors = [[0.0, 1.3], [2.0, 0.7]]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        blocks = build(stack(2, dtype=jnp.float64), fill_dtype=np.float64)
        factors = jnp.asarray(factors)
        masked = jnp.asarray(MASKED)
        layouts = {
            Dense: Dense(),
            Masked: Masked.from_mask(masked, 2),
            Gathered: Gathered.from_mask(masked, 2, 2),
        }
        layout = layouts[kind]
        x = layout.enter(jnp.asarray(rng.standard_normal((2, 4, 4, 5))), 1)

        def one_by_one(blocks, x, factors):
            for block, factor in zip(blocks, factors, strict=True):
                x = block(x, layout, factor)
            return layout.leave(x)

        expected = jax.tree.leaves(with_gradients(one_by_one, blocks, x, factors))
        assert len(expected) == 2 * 10 + 3
        for remat, scan in ways:

            def run(blocks, x, factors, remat=remat, scan=scan):
                return layout.leave(run_blocks(blocks, x, layout, factors, remat=remat, scan=scan))

            found = jax.tree.leaves(with_gradients(run, blocks, x, factors))
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == jnp.float64 and error(a, b) < 1e-12, (remat, scan)


def test_without_factors(build, error):
    """As with ones; also when there is but one block, which is not scanned."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 5)), jnp.float32)
    for depth, scan in ((1, True), (2, True), (2, False)):
        blocks = build(stack(depth))
        run = lambda factors: run_blocks(blocks, x, Dense(), factors, remat="none", scan=scan)  # noqa: B023, E731
        assert error(run(None), run(jnp.ones((depth, 2)))) < 1e-6


def test_networks_change_nothing(build, parameters, error, quickly_compiled):
    """A whole FCMAE while training, with stochastic depth: unrolled, and scanned with remat."""
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 24, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)

    def differentiate(**options):
        config = EncoderConfig((1, 2, 1, 1), DIMS, patch_size=1, drop_path=0.3, **options)
        model = build(FCMAE, config, decoder_dim=6, decoder_depth=2)

        def scalar(model, images, keys):
            loss = model(images, keys).loss
            return loss.sum(), loss

        return compiled(jax.grad(scalar, has_aux=True), model, images, keys)

    gradients, loss = differentiate(scan=False)
    expected = parameters(gradients)
    found, found_loss = differentiate(scan=True, remat="block")
    np.testing.assert_allclose(found_loss, loss, rtol=1e-6)
    for name, gradient in parameters(found).items():
        assert error(gradient[...], expected[name][...]) < 2e-5, name


# What it costs.


def encoder(depth, **options):
    config = EncoderConfig((1, 1, depth, 1), DIMS, patch_size=1, **options)
    return nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))


def lowered(depth, gradient, **options):
    """The program of an encoder, or of its gradient, as text."""
    function = lambda model, x: model.features(x)[-1].sum()  # noqa: E731
    function = jax.grad(function) if gradient else function
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return jax.jit(function).lower(encoder(depth, **options), images).as_text()


@pytest.mark.parametrize("gradient", [False, True])
def test_a_scanned_program_hardly_grows_with_depth(gradient):
    """From 2 to 6 blocks the scanned program has more parameters to stack, the unrolled one more products."""
    scanned, unrolled = ([lowered(d, gradient, scan=s) for d in (2, 6)] for s in (True, False))
    lines = [len(text.splitlines()) for text in scanned]
    assert lines[0] < lines[1] < 1.05 * lines[0]
    products = [text.count("stablehlo.dot_general") for text in scanned]
    assert products[0] == products[1] > 0
    products = [text.count("stablehlo.dot_general") for text in unrolled]
    assert products[1] > 1.5 * products[0]


def gradient_memory(remat, depth=12):
    """Bytes of temporary memory of the compiled gradient of a scanned stack."""
    blocks = nnx.eval_shape(lambda: stack(depth, 16)(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 16, 16, 16), jnp.float32)

    def scalar(blocks, x):
        return jnp.square(run_blocks(blocks, x, Dense(), remat=remat, scan=True)).sum()

    compiled = jax.jit(jax.grad(scalar)).lower(blocks, x).compile({"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes


def test_remat_saves_memory():
    """`block` keeps the maps between blocks alone, `dots` the results of products as well."""
    memory = {remat: gradient_memory(remat) for remat in REMAT}
    assert 0 < memory["block"] < 0.6 * memory["none"]
    assert memory["block"] < memory["dots"] < 0.95 * memory["none"]


def test_remat_computes_anew():
    """`dots` computes no matrix product twice, `block` some of them."""
    none, dots, block = (
        lowered(4, True, remat=remat).count("stablehlo.dot_general") for remat in ("none", "dots", "block")
    )
    assert none == dots < block


# Options.


@pytest.mark.parametrize("kind", [ConvNeXtV2, FCMAE])
def test_parameters_do_not_depend_on_how_they_are_run(kind, parameters):
    """Names, shapes and dtypes: a checkpoint of one is a checkpoint of the other."""

    def tree(**options):
        config = EncoderConfig((1, 3, 1, 1), DIMS, **options)
        model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
        return {name: (value.shape, value.dtype) for name, value in parameters(model).items()}

    prefix = "encoder." if kind is FCMAE else ""
    unrolled = tree(scan=False)
    assert f"{prefix}stages.1.2.dwconv.kernel" in unrolled
    assert unrolled == tree(scan=True) == tree(scan=True, remat="block")


@pytest.mark.parametrize(("wrong", "right"), [("blocks", "block"), ("dot", "dots"), ("nine", "none")])
def test_unknown_remat_policy_names_the_nearest(wrong, right):
    with pytest.raises(UserError, match=f"'{wrong}'; did you mean '{right}'"):
        EncoderConfig((1, 1, 1, 1), DIMS, remat=wrong)
