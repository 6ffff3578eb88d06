"""Every variant, without memory: names, shapes, counts and multiply-adds."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.models import VARIANTS, create_model, variant

GOLDEN = Path(__file__).parents[1] / "golden"

# Shared reference recipes.md: 1000 classes; timm for small.
PARAMETERS = {
    "atto": 3_708_400,
    "femto": 5_233_240,
    "pico": 9_066_280,
    "nano": 15_623_800,
    "tiny": 28_635_496,
    "small": 50_318_440,
    "base": 88_717_800,
    "large": 197_956_840,
    "huge": 660_289_640,
}
FCMAE_PARAMETERS = {  # decoder of width 512, one block
    "atto": 7_257_992,
    "femto": 8_751_472,
    "pico": 12_521_792,
    "nano": 19_016_592,
    "tiny": 31_965_568,
    "base": 91_922_432,
    "large": 200_910_592,
    "huge": 662_616_192,
}
GMACS = {  # (variant, image size) -> 10^9 multiply-adds
    ("atto", 224): 0.55,
    ("femto", 224): 0.78,
    ("pico", 224): 1.37,
    ("nano", 224): 2.45,
    ("tiny", 224): 4.47,
    ("base", 224): 15.4,
    ("large", 224): 34.4,
    ("huge", 224): 115,
    ("nano", 384): 7.21,
    ("tiny", 384): 13.1,
    ("base", 384): 45.2,
    ("large", 384): 101.1,
    ("huge", 384): 337.9,
    ("huge", 512): 600.8,
}


def abstract(name, **options):
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **options))


def count(parameters):
    return sum(math.prod(p.shape) for p in parameters.values())


def test_the_nine_variants():
    assert list(VARIANTS) == list(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name, parameters):
    found = parameters(abstract(f"convnextv2_{name}"))
    assert count(found) == PARAMETERS[name]
    assert {p.dtype for p in found.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", FCMAE_PARAMETERS)
def test_fcmae_parameter_count(name, parameters):
    assert count(parameters(abstract(f"fcmae_{name}"))) == FCMAE_PARAMETERS[name]


def test_parameter_names_of_atto(parameters):
    """The full list is stored: a changed name breaks every checkpoint in use."""
    found = parameters(abstract("convnextv2_atto"))
    lines = [f"{name} {list(p.shape)}" for name, p in found.items()]
    assert lines == (GOLDEN / "convnextv2_atto.txt").read_text().splitlines()


def test_stored_list_is_the_official_one():
    """The stored list, written out again from the official modules (`weight` -> `kernel`, `scale`)."""
    expected = {}

    def layer(name, kernel, features):
        expected[f"{name}.kernel"] = [*kernel, features]
        expected[f"{name}.bias"] = [features]

    def norm(name, features):
        expected[f"{name}.scale"] = expected[f"{name}.bias"] = [features]

    dims, depths = (40, 80, 160, 320), (2, 2, 6, 2)
    layer("downsample_layers.0.0", (4, 4, 3), 40)
    norm("downsample_layers.0.1", 40)
    for stage, dim in enumerate(dims):
        if stage:
            norm(f"downsample_layers.{stage}.0", dims[stage - 1])
            layer(f"downsample_layers.{stage}.1", (2, 2, dims[stage - 1]), dim)
        for block in range(depths[stage]):
            path = f"stages.{stage}.{block}"
            layer(f"{path}.dwconv", (7, 7), dim)
            norm(f"{path}.norm", dim)
            layer(f"{path}.pwconv1", (dim,), 4 * dim)
            expected[f"{path}.grn.gamma"] = expected[f"{path}.grn.beta"] = [4 * dim]
            layer(f"{path}.pwconv2", (4 * dim,), dim)
    norm("norm", 320)
    layer("head", (320,), 1000)
    lines = [f"{name} {shape}" for name, shape in sorted(expected.items())]
    assert (GOLDEN / "convnextv2_atto.txt").read_text().splitlines() == lines


def test_parameter_names_of_fcmae(parameters):
    """The encoder's names under `encoder.`, and the official decoder's; no final norm and no head."""
    names = set(parameters(abstract("fcmae_atto")))
    lines = (GOLDEN / "convnextv2_atto.txt").read_text().splitlines()
    encoder = {f"encoder.{line.split()[0]}" for line in lines}
    encoder = {n for n in encoder if not n.startswith(("encoder.norm.", "encoder.head."))}
    assert {n for n in names if n.startswith("encoder.")} == encoder
    block = ("dwconv.kernel", "dwconv.bias", "norm.scale", "norm.bias", "pwconv1.kernel")
    block += ("pwconv1.bias", "grn.gamma", "grn.beta", "pwconv2.kernel", "pwconv2.bias")
    assert names - encoder == {
        *("proj.kernel", "proj.bias", "mask_token", "pred.kernel", "pred.bias"),
        *(f"decoder.0.{name}" for name in block),
    }


def multiply_adds(jaxpr) -> int:
    """Multiply-adds of the matrix products and convolutions in a jaxpr and in all that it calls.

    A `scan` counts as often as it turns, a `cond` as its dearest branch: `lax.platform_dependent` is one,
    and the native convolution is dearer than the shifted sums, which are neither product nor convolution.
    """
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars]
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            # Kernel HWIO by the dimension numbers: everything but the output features.
            spec = equation.params["dimension_numbers"].rhs_spec
            total += out * math.prod(shapes[1]) // shapes[1][spec[0]]
        elif equation.primitive.name == "cond":
            total += max(multiply_adds(b.jaxpr) for b in equation.params["branches"])
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * multiply_adds(equation.params["jaxpr"].jaxpr)
        else:
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                if hasattr(value, "eqns"):
                    total += multiply_adds(getattr(value, "jaxpr", value))
    return total


def test_multiply_adds_are_counted_right():
    """The counter itself, on an example done by hand."""

    def example(x, k, m):
        def inner(x):
            y = jax.lax.conv_general_dilated(
                x,
                k,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=4,
            )
            return jax.lax.platform_dependent(y, cpu=lambda y: y, default=lambda y: y @ m)

        return jax.jit(inner)(jax.lax.scan(lambda x, _: (x @ m, None), x, length=3)[0])

    shapes = [(2, 5, 6, 4), (3, 3, 1, 4), (4, 4)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    positions = 2 * 5 * 6
    found = multiply_adds(jax.make_jaxpr(example)(*arrays).jaxpr)
    assert found == positions * 4 * 9 + (1 + 3) * positions * 4 * 4


@pytest.mark.parametrize(("name", "size"), GMACS)
def test_multiply_adds(name, size):
    graph, state = nnx.split(abstract(f"convnextv2_{name}"))
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    found = multiply_adds(jaxpr.jaxpr) / 1e9
    assert found == pytest.approx(GMACS[name, size], rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("convnextv2_tinny", "convnextv2_tiny"),
        ("convnext_base", "convnextv2_base"),
        ("fcmae_pice", "fcmae_pico"),
        ("convnextv2", "convnextv2"),
    ],
)
def test_unknown_model_names_the_nearest(wrong, right):
    with pytest.raises(UserError) as raised:
        create_model(wrong, rngs=nnx.Rngs(0))
    message = str(raised.value)
    assert f"'{wrong}'" in message and f"did you mean '{right}" in message
    assert "\n" not in message


def test_unknown_variant_names_the_nearest():
    with pytest.raises(UserError, match="'hugge'; did you mean 'huge'"):
        variant("hugge")
    assert variant("huge").dims == (352, 704, 1408, 2816)


def test_create_model_passes_options(parameters):
    model = abstract("convnextv2_atto", num_classes=7, in_chans=1, patch_size=2)
    found = parameters(model)
    assert found["head.kernel"].shape == (320, 7)
    assert found["downsample_layers.0.0.kernel"].shape == (2, 2, 1, 40)
