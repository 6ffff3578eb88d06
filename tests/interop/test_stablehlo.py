"""StableHLO: one file for every platform and batch size, which needs only JAX."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

from cnx2_jax.errors import UserError
from cnx2_jax.interop import stablehlo

ALONE = """
import sys
for name in ("cnx2_jax", "flax", "orbax", "tensorflow"):
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
import jax, numpy
file, images, result = map(Path, sys.argv[1:])
numpy.save(result, jax.export.deserialize(file.read_bytes()).call(numpy.load(images)))
"""


def test_results(kind, inference_model, example, error, tmp_path):
    stablehlo.write(tmp_path / "file", inference_model(kind))
    images, expected = example(kind)
    assert error(stablehlo.run(tmp_path / "file", images), expected) < 1e-5


def test_one_file_serves_every_batch_size_and_platform(inference_model, example, error, tmp_path):
    stablehlo.write(tmp_path / "file", inference_model())
    images, expected = example()
    for batch in (1, 3):
        assert error(stablehlo.run(tmp_path / "file", images[:batch]), expected[:batch]) < 1e-5
    loaded = export.deserialize(bytearray((tmp_path / "file").read_bytes()))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    assert f"with_jax_{jax.__version__}" in loaded.fun_name and "cnx2_jax_" in loaded.fun_name
    assert str(loaded.in_avals[0].shape) == "(b, 32, 64, 3)"
    # What the CPU does by shifts, the others do by convolution: both are there, to be chosen between.
    module = loaded.mlir_module()
    assert "stablehlo.case" in module and "feature_group_count = 8" in module


def test_jax_alone_runs_it(inference_model, example, error, tmp_path):
    stablehlo.write(tmp_path / "file", inference_model())
    images, expected = example()
    np.save(tmp_path / "images.npy", images[:2])
    arguments = [tmp_path / name for name in ("file", "images.npy", "result.npy")]
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert error(np.load(arguments[-1]), expected[:2]) < 1e-5


def test_weights_too_large_for_one_file_are_refused(inference_model, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "LIMIT", 1000)
    with pytest.raises(UserError, match="export as savedmodel or onnx"):
        stablehlo.write(tmp_path / "file", inference_model())
    assert not list(tmp_path.iterdir())
