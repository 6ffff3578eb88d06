"""FCMAE with a gathered encoder is FCMAE with a masked one: the same loss and gradients for less work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.kernels import depthwise
from cnx2_jax.models import FCMAE, EncoderConfig, create_model
from cnx2_jax.models.fcmae import LAYOUTS
from cnx2_jax.models.layouts import Gathered, Masked

pytestmark = pytest.mark.usefixtures("compile_quickly")


@dataclasses.dataclass(frozen=True)
class Case:
    """Images, masks and a network."""

    height: int
    width: int
    ratio: float
    visible: int  # cells of the mask
    batch: int = 2
    patch_size: int = 1
    mask_patch: int = 0
    depths: tuple[int, ...] = (1, 1, 1, 1)
    drop_path: float = 0.0

    @property
    def mask_strides(self) -> int:
        return (self.mask_patch or 8 * self.patch_size) // (8 * self.patch_size)


QUARTER = Case(24, 40, 0.25, 11)
CASES = {
    "nothing hidden": Case(16, 24, 0.0, 6),
    "one cell of one image": Case(24, 40, 0.9, 1, batch=1),
    "cells of two strides, stem patches, two blocks, stochastic depth": Case(
        64, 96, 0.6, 2, batch=4, patch_size=2, mask_patch=32, depths=(2, 1, 2, 1), drop_path=0.4
    ),
}


def differentiate(build, case, layout, dtype=jnp.float32):
    """Returns the losses, the masks and the gradients of a scalar, with masks from the same keys."""
    wide = np.float64 if dtype == jnp.float64 else np.float32
    model = build(
        FCMAE,
        EncoderConfig(
            case.depths, (4, 6, 8, 10), patch_size=case.patch_size, drop_path=case.drop_path, dtype=dtype
        ),
        mask_patch=case.mask_patch,
        mask_ratio=case.ratio,
        decoder_dim=12,
        layout=layout,
        fill_dtype=wide,
    )
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.standard_normal((case.batch, case.height, case.width, 3)), wide)
    keys = jax.random.split(jax.random.key(0), case.batch)

    def apply(model, images, keys):
        def scalar(model):
            output = model(images, keys)
            # With nothing hidden, the loss has no gradient.
            return output.loss.sum() if case.ratio else jnp.sin(output.prediction).sum(), output

        return jax.grad(scalar, has_aux=True)(model)

    # The convolution of TPUs and GPUs compiles faster; test_layouts.py and test_sparse.py have the CPU's.
    with pytest.MonkeyPatch.context() as patch:
        choose = lambda *arrays, default, **_: default(*arrays)  # noqa: E731
        patch.setattr(depthwise.lax, "platform_dependent", choose)
        lowered = jax.jit(apply).lower(model, images, keys)
    gradients, output = lowered.compile()(model, images, keys)
    masked = np.asarray(output.masked)
    assert ((~masked).sum(axis=(1, 2)) == case.visible * case.mask_strides**2).all()
    return output.loss, masked, gradients


def assert_same(found, expected, parameters, error, loss_bound, bound):
    """Losses by relative difference, the gradient of each parameter by its largest entry."""
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=loss_bound)
    found, expected = parameters(found[2]), parameters(expected[2])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name == "mask_token" and not gradient[...].any():  # with nothing hidden
            np.testing.assert_array_equal(found[name][...], 0)
        else:
            assert error(found[name][...], gradient[...]) < bound, name


@pytest.mark.parametrize("case", CASES)
def test_gathered_is_masked(case, build, parameters, error):
    """Loss and every gradient, with the same masks; in float64, to rounding."""
    with jax.enable_x64(True):
        found, expected = (
            differentiate(build, CASES[case], layout, jnp.float64) for layout in ("gathered", "masked")
        )
        assert (expected[0] > 0).all() == (CASES[case].ratio > 0)
        assert_same(found, expected, parameters, error, 1e-12, 1e-10)


@pytest.fixture(scope="module")
def masked_everywhere(build):
    with jax.enable_x64(True):
        return differentiate(build, QUARTER, "masked", jnp.float64)


@pytest.mark.parametrize("kinds", ["MGGM", "GGMG", "GMGG"])
def test_mixtures_are_masked(kinds, masked_everywhere, build, parameters, error, monkeypatch):
    """Each stage held either way, which carries the map over between them; in float64.

    With `masked_everywhere`, these have every pair of kinds at every boundary of two stages.
    """
    monkeypatch.setitem(LAYOUTS, "mixed", tuple({"M": Masked, "G": Gathered}[kind] for kind in kinds))
    with jax.enable_x64(True):
        found = differentiate(build, QUARTER, "mixed", jnp.float64)
    assert_same(found, masked_everywhere, parameters, error, 1e-12, 1e-10)


def test_gathered_is_masked_at_full_width(build, parameters, error):
    """The atto network in float32, with the CPU's own kernels."""
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 96, 128, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(2), 2)
    results = []
    for layout in ("masked", "gathered"):
        model = build(functools.partial(create_model, "fcmae_atto"), layout=layout)
        scalar = jax.value_and_grad(lambda model: model(images, keys).loss.mean())
        results.append(jax.jit(scalar)(model))
    (expected, masked), (found, gathered) = results
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    masked, gathered = parameters(masked), parameters(gathered)
    for name, gradient in masked.items():
        assert error(gathered[name][...], gradient[...]) < 1e-5, name


def test_bfloat16_tracks_float32(masked_everywhere, build, parameters):
    """Losses, and the gradient as one vector."""
    with jax.enable_x64(True):  # for the same masks
        loss, masked, gradients = differentiate(build, QUARTER, "gathered", jnp.bfloat16)
    np.testing.assert_array_equal(masked, masked_everywhere[1])
    np.testing.assert_allclose(loss, masked_everywhere[0], rtol=0.01)
    found, expected = (
        np.concatenate([g[...].ravel() for g in parameters(tree).values()])
        for tree in (gradients, masked_everywhere[2])
    )
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_gathered_takes_less_memory_and_arithmetic():
    """Of the loss's gradient with a quarter visible: 0.4 and 0.3 of what Masked takes, as compiled here."""
    costs = {}
    config = EncoderConfig((1, 1, 1, 1), (16, 32, 64, 128), patch_size=2)
    for layout in LAYOUTS:
        options = {"decoder_dim": 16, "mask_ratio": 0.75, "layout": layout}
        model = nnx.eval_shape(lambda options=options: FCMAE(config, rngs=nnx.Rngs(0), **options))
        images, keys = (
            jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
            jax.random.split(jax.random.key(0), 2),
        )
        gradient = jax.grad(lambda model, images, keys: model(images, keys).loss.sum())
        lowered = jax.jit(gradient).lower(model, images, keys)
        compiled = lowered.compile()
        costs[layout] = compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]
    memory, arithmetic = (g / m for g, m in zip(costs["gathered"], costs["masked"], strict=True))
    assert 0 < memory < 0.5 and 0 < arithmetic < 0.4


def small_fcmae(build, layout):
    """Returns a model that hides half of the squares of 16 x 16 pixels, two strides wide."""
    config = EncoderConfig((1, 1, 1, 1), (4, 6, 8, 10), patch_size=1)
    return build(FCMAE, config, mask_patch=16, mask_ratio=0.5, decoder_dim=4, layout=layout)


ODD_MASKS = {
    "another count": [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "no whole squares": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]],
}


def test_fixed_mask_in_a_jitted_function(build):
    """A mask that is a constant of the traced function is checked too, and gives what drawn masks give."""
    model = small_fcmae(build, "gathered")
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 1)
    expected = jax.jit(lambda images: model(images, keys).loss.sum())(images)
    wrong = jnp.asarray([ODD_MASKS["another count"]], bool)

    def loss(images, masked):
        return model(images, keys, masked).loss.sum()

    for run in (
        lambda masked: jax.jit(lambda images: loss(images, masked))(images),
        lambda masked: jax.jit(jax.value_and_grad(lambda images: loss(images, masked)))(images)[0],
    ):
        np.testing.assert_allclose(run(model.mask(keys, 32, 32)), expected, rtol=1e-6)
        with pytest.raises(UserError, match="leave 2 of 4 squares of 16 pixels visible"):
            run(wrong)


def test_masks_from_elsewhere(build):
    """`gathered` refuses masks it has no room for; `auto` and `masked` let nothing hidden through."""
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 1)
    masks = [jnp.asarray([mask], bool) for mask in ODD_MASKS.values()]
    for masked in masks:
        with pytest.raises(UserError, match="leave 2 of 4 squares of 16 pixels visible"):
            small_fcmae(build, "gathered")(images, keys, masked)
    sums = {}
    for layout in ("masked", "auto"):
        model = small_fcmae(build, layout)
        total = jax.jit(jax.value_and_grad(lambda x, masked, m=model: m(x, keys, masked).prediction.sum()))
        for index, masked in enumerate(masks):
            hidden = np.kron(np.asarray(masked), np.ones((8, 8))) > 0
            sums[layout, index], gradient = total(images, masked)
            assert (np.asarray(gradient)[hidden] == 0).all() and (np.asarray(gradient)[~hidden] != 0).any()
    assert all(sums["auto", index] == sums["masked", index] for index in range(len(masks)))
