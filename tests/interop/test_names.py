"""State dicts in three namings, against lists made from timm's and the authors' code, and back."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from cnx2_jax.errors import UserError
from cnx2_jax.interop.names import from_torch, to_torch
from cnx2_jax.models import VARIANTS, create_model

NAMINGS = ("official", "timm", "huggingface")  # of classifiers
GOLDEN = Path(__file__).parents[1] / "golden"


def listed(file):
    """Returns the lines of atto and the digests of the variants from a golden file."""
    lines = [line for line in (GOLDEN / file).read_text().splitlines() if not line.startswith("#")]
    return lines[: -len(VARIANTS)], dict(line.split() for line in lines[-len(VARIANTS) :])


def lines_of(tensors):
    return sorted(f"{name} {list(value.shape)}" for name, value in tensors.items())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert np.array_equal(found[name].ravel().view(np.uint8), value.ravel().view(np.uint8)), name


def in_minkowski_form(dense):
    """Converts an official dense encoder to MinkowskiEngine's form, position by position."""
    sparse = {}
    for name, value in dense.items():
        *modules, leaf = name.split(".")
        path = ".".join(modules)
        if name.startswith("downsample_layers.0."):  # the stem is dense there too
            sparse[name] = value
        elif ".grn." in name:
            sparse[name] = value.reshape(1, -1)
        elif "pwconv" in name:
            sparse[f"{path}.linear.{leaf}"] = value
        elif value.ndim == 4:
            out, inside, side, _ = value.shape
            kernel = np.zeros((side * side, inside, out), value.dtype)
            for row in range(side):
                for column in range(side):
                    kernel[column * side + row] = value[:, :, row, column].T
            sparse[f"{path}.kernel"] = kernel[:, 0] if "dwconv" in name else kernel
        elif f"{path}.weight" in dense and dense[f"{path}.weight"].ndim == 4:
            sparse[name] = value[None]
        else:
            sparse[f"{path}.ln.{leaf}"] = value
    return sparse


@pytest.mark.parametrize("variant", VARIANTS)
def test_through_every_naming_and_back(variant, numbered_params):
    """Every bit is the same after the round trip; names and shapes are those of the other library."""
    params = numbered_params(lambda: create_model(f"convnextv2_{variant}", rngs=nnx.Rngs(0)))
    found = params
    for naming in NAMINGS:
        tensors = to_torch(found, naming)
        if naming != "huggingface":  # whose own lists tests/parity has
            lines, digests = listed(f"{naming}_convnextv2.txt")
            assert variant != "atto" or lines_of(tensors) == lines
            digest = hashlib.sha256("\n".join(lines_of(tensors)).encode()).hexdigest()
            assert digest == digests[variant]
        assert all(value.flags.c_contiguous for value in tensors.values())
        imported = from_torch(tensors, "a file")
        found = imported.params
        chosen = VARIANTS[variant]
        assert (imported.depths, imported.dims) == (chosen.depths, chosen.dims)
        assert (imported.variant, imported.naming, imported.num_classes) == (variant, naming, 1000)
        assert (imported.in_chans, imported.patch_size) == (3, 4)
        assert not imported.has_decoder and not imported.fresh_norm
    assert_same(found, params)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("classes", [0, 7])
def test_round_trip_of_another_network(naming, classes, build):
    model = build(
        create_model, "convnextv2_atto", num_classes=classes, in_chans=5, patch_size=1, seed=classes
    )
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in state}
    params["norm.bias"][:3] = [np.nan, -0.0, np.inf]
    imported = from_torch(to_torch(params, naming), "a file")
    assert_same(imported.params, params)
    assert (imported.num_classes, imported.in_chans, imported.patch_size) == (classes, 5, 1)
    assert imported.variant == "atto"


def test_depths_and_dims_of_no_variant(small):
    imported = from_torch(to_torch(small, "timm"), "a file")
    assert imported.variant == "custom"
    assert (imported.depths, imported.dims) == ((1, 2, 1, 1), (8, 16, 24, 40))


def test_layouts_by_hand(small):
    """Checks single values, which also finds mistakes that a round trip cancels."""
    tensors = to_torch(small, "official")
    stem, depthwise = tensors["downsample_layers.0.0.weight"], tensors["stages.1.1.dwconv.weight"]
    assert stem[7, 2, 1, 3] == small["downsample_layers.0.0.kernel"][1, 3, 2, 7]
    assert depthwise[9, 0, 2, 6] == small["stages.1.1.dwconv.kernel"][2, 6, 9]
    assert tensors["stages.1.1.pwconv1.weight"][60, 3] == small["stages.1.1.pwconv1.kernel"][3, 60]
    assert tensors["stages.1.1.grn.beta"][0, 0, 0, 5] == small["stages.1.1.grn.beta"][5]
    in_timm = to_torch(small, "timm")
    assert in_timm["stages.1.blocks.1.mlp.grn.weight"][5] == small["stages.1.1.grn.gamma"][5]
    assert in_timm["head.fc.weight"][2, 39] == small["head.kernel"][39, 2]


def test_timm_may_hold_linear_layers_or_convolutions(small):
    tensors = to_torch(small, "timm")
    for name, value in tensors.items():
        if ".mlp.fc" in name and name.endswith("weight"):
            tensors[name] = value[..., None, None]
    assert_same(from_torch(tensors, "a file").params, small)


@pytest.mark.parametrize(
    ("naming", "change"),
    [
        ("official", lambda name: f"module.{name}"),
        ("timm", lambda name: f"module.{name}"),
        ("huggingface", lambda name: name.removeprefix("convnextv2.")),
    ],
)
def test_prefixes(small, naming, change):
    tensors = {change(name): value for name, value in to_torch(small, naming).items()}
    imported = from_torch(tensors, "a file")
    assert imported.naming == naming
    assert_same(imported.params, small)


def test_hugging_face_encoder_with_prefix(small_encoder):
    tensors = {f"convnextv2.{n}": value for n, value in to_torch(small_encoder, "huggingface").items()}
    assert_same(from_torch(tensors, "a file").params, small_encoder)


@pytest.mark.parametrize("prefix", ["", "encoder."])
@pytest.mark.parametrize("form", [dict, in_minkowski_form])
def test_pretrained_encoders_get_a_fresh_norm(small_encoder, form, prefix):
    """The authors released encoders in dense and in MinkowskiEngine's form."""
    dense = to_torch(small_encoder, "official")
    del dense["norm.weight"], dense["norm.bias"]
    imported = from_torch({prefix + name: value for name, value in form(dense).items()}, "a file")
    assert imported.fresh_norm and not imported.num_classes and not imported.has_decoder
    fresh = {"norm.scale": np.ones(40, np.float32), "norm.bias": np.zeros(40, np.float32)}
    assert_same(imported.params, {**small_encoder, **fresh})


def test_minkowski_kernels_count_column_by_column(small_encoder):
    """Kernels are 0 except at row 1, column 5 (7x7) and at row 0, column 1 (2x2)."""
    dense = to_torch(small_encoder, "official")
    del dense["norm.weight"], dense["norm.bias"]
    tensors = in_minkowski_form(dense)
    depthwise = np.zeros((49, 8), np.float32)
    depthwise[5 * 7 + 1, 3] = 2
    down = np.zeros((4, 8, 16), np.float32)
    down[1 * 2 + 0, 6, 9] = 3
    tensors |= {"stages.0.0.dwconv.kernel": depthwise, "downsample_layers.1.1.kernel": down}
    params = from_torch(tensors, "a file").params
    assert params["stages.0.0.dwconv.kernel"].sum() == params["stages.0.0.dwconv.kernel"][1, 5, 3] == 2
    assert params["downsample_layers.1.1.kernel"].sum() == 3
    assert params["downsample_layers.1.1.kernel"][0, 1, 6, 9] == 3


def test_fcmae_in_the_authors_training_form():
    """Every name and shape of the authors' FCMAE, listed from their code."""
    lines, _ = listed("official_fcmae.txt")
    rng = np.random.default_rng(0)
    tensors = {}
    for line in lines:
        name, _, shape = line.partition(" ")
        tensors[name] = rng.standard_normal([int(n) for n in shape.strip("[]").split(",")], np.float32)
    imported = from_torch(tensors, "a file")
    assert (imported.variant, imported.decoder_dim, imported.decoder_depth) == ("atto", 512, 1)
    assert imported.has_decoder and not imported.fresh_norm and not imported.num_classes
    assert sum(value.size for value in imported.params.values()) == 7_257_992
    # Their pred and ours both order a patch by row, column, channel (`patchify`), so this is a transpose.
    np.testing.assert_array_equal(imported.params["pred.kernel"], tensors["pred.weight"][:, :, 0, 0].T)
    np.testing.assert_array_equal(imported.params["mask_token"], tensors["mask_token"].ravel())
    assert imported.params["encoder.stages.2.5.grn.gamma"].shape == (640,)


def test_fcmae_round_trip(small_fcmae):
    tensors = to_torch(small_fcmae, "official")
    assert tensors["proj.weight"].shape == (12, 40, 1, 1) and tensors["mask_token"].shape == (1, 12, 1, 1)
    imported = from_torch(tensors, "a file")
    assert (imported.decoder_dim, imported.decoder_depth) == (12, 2)
    assert_same(imported.params, small_fcmae)


@pytest.mark.parametrize("naming", ["timm", "huggingface"])
def test_fcmae_has_no_place_elsewhere(small_fcmae, naming):
    with pytest.raises(UserError, match=f"{naming} has no FCMAE"):
        to_torch(small_fcmae, naming)


def test_unknown_naming(small):
    with pytest.raises(UserError, match="'tim'; did you mean 'timm'"):
        to_torch(small, "tim")


def refusal(tensors):
    with pytest.raises(UserError) as raised:
        from_torch(tensors, "weights.pt")
    message = str(raised.value)
    assert "'weights.pt'" in message and "\n" not in message
    return message


def test_all_that_does_not_fit_is_listed(small):
    tensors = to_torch(small, "timm")
    del tensors["stages.0.blocks.0.norm.bias"]
    tensors["stages.0.blocks.0.gamma"] = np.zeros(8)
    tensors["head.fc.weight"] = np.zeros((3, 41))
    message = refusal(tensors)
    assert "1 unknown: 'stages.0.blocks.0.gamma'" in message
    assert "1 missing: 'stages.0.blocks.0.norm.bias'" in message
    assert "1 misshapen: 'head.fc.weight' [3, 41], not [3, 40]" in message


def test_long_lists_are_cut(small):
    tensors = to_torch(small, "official")
    tensors |= {f"extra.{index}": np.zeros(1) for index in range(9)}
    assert "9 unknown: 'extra.0', 'extra.1', 'extra.2', 'extra.3' and 5 more" in refusal(tensors)


@pytest.mark.parametrize(
    "name",
    ["head.norm.weight", "head.fc.weight", "head.fc.bias", "stages.2.downsample.1.bias", "stem.1.bias"],
)
def test_nothing_may_be_missing(small, name):
    tensors = to_torch(small, "timm")
    del tensors[name]
    assert f"'{name}'" in refusal(tensors)


def test_a_gap_between_blocks(small):
    tensors = {n: v for n, v in to_torch(small, "official").items() if not n.startswith("stages.1.0.")}
    message = refusal(tensors)
    assert "10 missing: 'stages.1.0.dwconv.bias'" in message
    assert "10 unknown: 'stages.1.1.dwconv.bias'" in message


def test_a_stage_without_blocks(small):
    tensors = {n: v for n, v in to_torch(small, "official").items() if not n.startswith("stages.3.")}
    assert "10 missing: 'stages.3.0.dwconv.bias'" in refusal(tensors)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"conv1.weight": np.zeros((64, 3, 7, 7)), "fc.bias": np.zeros(10)}],
    ids=["empty", "ResNet"],
)
def test_other_networks(tensors):
    message = refusal(tensors)
    assert "is not a ConvNeXt V2 in official, timm, Hugging Face or mmdetection naming" in message
    assert not tensors or "'conv1.weight', 'fc.bias'" in message


def test_convnext_of_the_first_version(small):
    """It has layer scale instead of GRN."""
    tensors = {n: v for n, v in to_torch(small, "official").items() if ".grn." not in n}
    tensors |= {f"stages.{s}.{b}.gamma": np.zeros(8) for s, b in [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)]}
    message = refusal(tensors)
    assert "5 unknown" in message and "10 missing: 'stages.0.0.grn.beta'" in message


def test_stems_that_are_none(small):
    tensors = to_torch(small, "official")
    tensors["downsample_layers.0.0.weight"] = np.zeros((8, 48))
    assert "[8, 48]" in refusal(tensors)
    tensors["downsample_layers.0.0.weight"] = np.zeros((8, 3, 4, 2))
    assert "[8, 3, 4, 2], not [8, 3, 4, 4]" in refusal(tensors)
