"""Folders for transformers and timm as files; tests/parity/test_weights.py runs them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from cnx2_jax.errors import UserError
from cnx2_jax.interop import names
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.safetensors import write

SAID = Facts(("cat", "dog", "newt"), (64, 64), 0.875, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def as_float32(params):
    return {name: value.astype(np.float32) / 251 for name, value in params.items()}


@pytest.mark.parametrize("naming", ["huggingface", "timm"])
def test_weights_are_those_of_the_naming(tmp_path, small, naming):
    params = as_float32(small)
    write(tmp_path / "new" / "model", params, SAID, naming)
    found = safetensors.numpy.load_file(tmp_path / "new" / "model" / "model.safetensors")
    expected = names.to_torch(params, naming)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]  # nothing beside it


def test_timm_is_told_what_to_build(tmp_path, small):
    write(tmp_path / "model", as_float32(small), SAID, "timm")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "convnextv2_tiny"
    assert config["model_args"] == {"depths": [1, 2, 1, 1], "dims": [8, 16, 24, 40]}
    assert config["label_names"] == ["cat", "dog", "newt"]
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_nothing_is_overwritten(tmp_path, small):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match="exists already"):
        write(folder, as_float32(small), SAID, "timm")
    assert not list(folder.iterdir())


def test_names_must_fit_the_head(tmp_path, small, small_encoder):
    with pytest.raises(UserError, match="2 class names do not fit a head of 3"):
        write(tmp_path / "a", as_float32(small), dataclasses.replace(SAID, class_names=("a", "b")), "timm")
    with pytest.raises(UserError, match="3 class names do not fit a head of 0"):
        write(tmp_path / "b", as_float32(small_encoder), SAID, "timm")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "model", as_float32(small), SAID, "huggingface")


def test_what_comes_back_otherwise_is_no_folder(tmp_path, small):
    """Reading widens half precision, so the bits differ from the given ones."""
    params = {name: value.astype(np.float16) for name, value in small.items()}
    with pytest.raises(UserError, match="was read back with other bits"):
        write(tmp_path / "model", params, SAID, "timm")
    assert not list(tmp_path.iterdir())
