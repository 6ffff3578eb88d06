"""Files of weights without PyTorch; tests/parity/test_weights.py reads pickles."""

import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cnx2_jax.errors import UserError
from cnx2_jax.interop.files import read_tensors


def refusal(path):
    with pytest.raises(UserError) as raised:
        read_tensors(path)
    message = str(raised.value)
    assert f"'{path}'" in message and "\n" not in message
    return message


def test_floating_tensors_become_float32(tmp_path):
    values = np.array([[1.5, -0.0, 2**-14], [np.inf, 3.140625, -7.0]])
    kinds = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
    tensors = {name: values.astype(kind) for name, kind in kinds.items()}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({**tensors, "count": np.array([3, 4])}, path)
    found = read_tensors(path)
    assert found["count"].dtype == np.int64
    for name in kinds:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values.astype(np.float32))
        assert np.signbit(found[name][0, 1])


def test_truncated(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "a page of HTML"),
    ],
    ids=["empty", "lfs", "html"],
)
def test_what_was_not_downloaded(tmp_path, suffix, content, said):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert said in refusal(path)


def test_no_files(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.pt")
    (tmp_path / "folder.safetensors").mkdir()
    assert "directory" in refusal(tmp_path / "folder.safetensors")
    (tmp_path / "model.h5").write_bytes(b"x")
    assert ".safetensors, .pt, .pth, .bin" in refusal(tmp_path / "model.h5")


def test_pickles_need_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK")
    assert "pip install 'cnx2_jax[torch]'" in refusal(path)
