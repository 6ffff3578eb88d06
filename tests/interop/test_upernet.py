"""UperNet to the names of transformers and mmsegmentation and back; tests/parity runs the results."""

import json

import numpy as np
import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.interop import facts
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.names import Heads, from_torch, to_torch
from cnx2_jax.interop.safetensors import write
from cnx2_jax.models import EncoderConfig, UperNet
from cnx2_jax.models.state import split

CONFIG = EncoderConfig((1, 2, 1, 1), (8, 16, 24, 40), patch_size=1, in_chans=5)
NAMES = ("sky", "tree", "road")
SAID = Facts(NAMES, (64, 96), 1.0, (0.5, 0.4, 0.3, 0.2, 0.1), (0.2,) * 5)


@pytest.fixture(scope="module")
def arrays(build):
    """Parameters and running averages of a small UperNet with three classes and two pool scales."""
    options = {"channels": 6, "auxiliary_channels": 7, "pool_scales": (2, 5)}
    model = build(UperNet, CONFIG, num_classes=3, **options)
    return {name: np.asarray(value) for name, value in split(model)[1].items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("naming", ["official", "huggingface"])
def test_there_and_back(arrays, naming, prefix):
    tensors = {prefix + name: value for name, value in to_torch(arrays, naming).items()}
    imported = from_torch(tensors, "a file")
    assert (imported.depths, imported.dims) == (CONFIG.depths, CONFIG.dims)
    assert (imported.in_chans, imported.patch_size, imported.num_classes) == (5, 1, 3)
    assert (imported.naming, imported.heads) == (naming, Heads(6, 7, 2))
    assert imported.params.keys() == arrays.keys()
    for name, value in arrays.items():
        assert imported.params[name].tobytes() == value.tobytes(), name
        assert imported.params[name].shape == value.shape, name


def test_names_of_mmsegmentation(arrays):
    """Single names and layouts, written out from mmsegmentation's modules."""
    tensors = to_torch(arrays, "official")
    for theirs, ours in (
        ("backbone.stages.1.1.pwconv1.weight", "backbone.stages.1.1.pwconv1.kernel"),
        ("backbone.norm3.weight", "backbone.norm3.scale"),
        ("decode_head.psp_modules.1.1.bn.running_var", "decode_head.psp_modules.1.1.bn.var"),
        ("decode_head.lateral_convs.2.bn.running_mean", "decode_head.lateral_convs.2.bn.mean"),
        ("auxiliary_head.convs.0.bn.weight", "auxiliary_head.convs.0.bn.scale"),
        ("decode_head.conv_seg.bias", "decode_head.conv_seg.bias"),
    ):
        np.testing.assert_array_equal(tensors[theirs], arrays[ours].T, err_msg=theirs)
    kernel = arrays["decode_head.fpn_bottleneck.conv.kernel"]
    assert tensors["decode_head.fpn_bottleneck.conv.weight"][4, 20, 0, 2] == kernel[0, 2, 20, 4]
    assert tensors["decode_head.conv_seg.weight"].shape == (3, 6, 1, 1)
    counts = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert len(counts) == 2 + 1 + 3 + 3 + 1 + 1 and "decode_head.bottleneck.bn.num_batches_tracked" in counts
    assert {(tensors[name].dtype, tensors[name].shape, int(tensors[name])) for name in counts} == {
        (np.dtype(np.int64), (), 0)
    }


def test_no_place_in_timm(arrays):
    with pytest.raises(UserError, match="timm has no UperNet"):
        to_torch(arrays, "timm")


@pytest.mark.parametrize("naming", ["official", "huggingface"])
def test_what_does_not_fit_is_listed(arrays, naming):
    tensors = to_torch(arrays, naming)
    bn = "batch_norm" if naming == "huggingface" else "bn"
    del tensors[f"decode_head.fpn_convs.1.{bn}.running_mean"]
    tensors["decode_head.psp_modules.0.1.conv.weight"] = np.zeros((6, 41, 1, 1))
    tensors["neck.weight"] = np.zeros(1)
    with pytest.raises(UserError) as raised:
        from_torch(tensors, "weights.pt")
    message = str(raised.value)
    assert "1 unknown: 'neck.weight'" in message
    assert f"1 missing: 'decode_head.fpn_convs.1.{bn}.running_mean'" in message
    assert "'decode_head.psp_modules.0.1.conv.weight' [6, 41, 1, 1], not [6, 40, 1, 1]" in message


@pytest.mark.parametrize("name", ["auxiliary_head.convs.0.bn.bias", "decode_head.conv_seg.bias"])
def test_both_heads_are_needed(arrays, name):
    tensors = to_torch(arrays, "official")
    del tensors[name]
    with pytest.raises(UserError, match=f"'{name}' is missing"):
        from_torch(tensors, "weights.pt")


def test_the_written_json_comes_back(tmp_path, arrays):
    write(tmp_path / "model", arrays, SAID, "huggingface", (2, 5))
    found = facts.read(tmp_path / "model")
    assert found == {
        "class_names": NAMES,
        "image_size": (64, 96),
        "mean": SAID.mean,
        "std": SAID.std,
        "pool_scales": (2, 5),
    }
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["auxiliary_channels"]) == (6, 7)
    assert config["auxiliary_in_channels"] == 24 and config["loss_ignore_index"] == 255
    facts.check_sizes(tmp_path / "model", CONFIG.depths, CONFIG.dims)
    with pytest.raises(UserError, match="depths"):
        facts.check_sizes(tmp_path / "model", (1, 1, 1, 1), CONFIG.dims)


def test_written_scales_and_names_must_fit(tmp_path, arrays):
    with pytest.raises(UserError, match="4 pool scales do not fit 2 levels"):
        write(tmp_path / "a", arrays, SAID, "huggingface", (1, 2, 3, 6))
    with pytest.raises(UserError, match="0 class names do not fit a head of 3"):
        write(tmp_path / "b", arrays, Facts((), *list(vars(SAID).values())[1:]), "huggingface", (2, 5))
    assert not list(tmp_path.iterdir())
