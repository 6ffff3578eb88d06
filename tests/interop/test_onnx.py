"""ONNX: one standard graph that onnxruntime runs, at any batch size."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cnx2_jax.interop import onnx as ours  # noqa: E402 - it imports onnx

CONSTANTS = {"epsilon", "one", "positions", "channels"}


def test_results(kind, inference_model, example, error, tmp_path):
    ours.write(tmp_path / "file", inference_model(kind))
    images, expected = example(kind)
    for batch in (1, 3, 5):
        assert error(ours.run(tmp_path / "file", images[:batch]), expected[:batch]) < 1e-5


def test_graph(kind, inference_model, tmp_path):
    exported = inference_model(kind)
    ours.write(tmp_path / "file", exported)
    model = onnx.load(tmp_path / "file")
    ((name, inputs),) = [(x.name, x.type.tensor_type) for x in model.graph.input]
    ((result, output),) = [(x.name, x.type.tensor_type) for x in model.graph.output]
    ((expected_name, expected),) = exported.outputs.items()
    assert (name, result) == ("images", expected_name)
    assert onnx.helper.tensor_dtype_to_np_dtype(inputs.elem_type) == exported.dtype
    assert [x.dim_param or x.dim_value for x in inputs.shape.dim] == ["batch", *exported.shape]
    assert [x.dim_param or x.dim_value for x in output.shape.dim] == ["batch", *expected.shape]
    assert ("mean (0.5," in model.graph.input[0].doc_string) != kind.uint8

    weights = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    normalisation = {"full", "mean", "std"} if kind.uint8 else set()
    assert weights.keys() == exported.params.keys() | CONSTANTS | normalisation
    for name, value in exported.params.items():
        assert weights[name].size == value.size, name
    np.testing.assert_array_equal(
        weights["stages.0.0.dwconv.kernel"][:, 0, 2, 5], exported.params["stages.0.0.dwconv.kernel"][2, 5]
    )
    assert all(node.domain == "" for node in model.graph.node)
    assert {x.domain: x.version for x in model.opset_import} == {"": 20}


def test_large_weights_go_into_a_second_file_that_moves_along(
    inference_model, example, error, tmp_path, monkeypatch
):
    monkeypatch.setattr(ours, "LIMIT", 1000)
    exported = inference_model()
    (tmp_path / "a").mkdir()
    ours.write(tmp_path / "a" / "file", exported)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"file", "file.data"}
    weights = sum(value.nbytes for value in exported.params.values())
    assert (tmp_path / "a" / "file.data").stat().st_size > 0.9 * weights
    (tmp_path / "a").rename(tmp_path / "b")
    images, expected = example()
    assert error(ours.run(tmp_path / "b" / "file", images), expected) < 1e-5
