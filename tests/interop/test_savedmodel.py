"""SavedModel: a folder that TensorFlow alone runs, at any batch size."""

import subprocess
import sys

import numpy as np
import pytest

from cnx2_jax.data.tensorflow import tf
from cnx2_jax.interop import savedmodel

ALONE = """
import sys
for name in ("cnx2_jax", "flax", "jax", "jaxlib"):
    sys.modules[name] = None  # an import of it fails
import numpy, tensorflow
folder, images, result = sys.argv[1:]
loaded = tensorflow.saved_model.load(folder)
images = tensorflow.constant(numpy.load(images))
numpy.save(result, loaded.signatures["serving_default"](images=images)["logits"])
"""


@pytest.fixture(scope="module")
def written(kind, inference_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "folder"
    savedmodel.write(folder, inference_model(kind))
    return folder


def test_results(kind, written, example, error):
    images, expected = example(kind)
    assert error(savedmodel.run(written, images), expected) < 1e-5


def test_signature_and_variables(kind, written, inference_model, example, error):
    exported = inference_model(kind)
    loaded = tf.saved_model.load(str(written))  # a signature alone does not keep its variables alive
    signature = loaded.signatures["serving_default"]
    ((_, inputs),) = signature.structured_input_signature[1].items()
    assert inputs.name == "images" and inputs.dtype == exported.dtype
    assert inputs.shape.as_list() == [None, *exported.shape]
    ((name, output),) = signature.structured_outputs.items()
    assert {name: output.shape.as_list()} == {
        name: [None, *result.shape] for name, result in exported.outputs.items()
    }
    found = {variable.name.removesuffix(":0"): variable.numpy() for variable in signature.variables}
    assert found.keys() == exported.params.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, exported.params[name])
    # The weights are not in the graph as well, which may not grow to 2 GB.
    functions = signature.graph.as_graph_def().library.function
    constants = [node for function in functions for node in function.node_def if node.op == "Const"]
    assert max(tf.make_ndarray(node.attr["value"].tensor).size for node in constants) < 10

    images, expected = example(kind)
    for batch in (1, 3):
        (found,) = signature(images=tf.constant(images[:batch])).values()
        assert error(found, expected[:batch]) < 1e-5


def test_tensorflow_alone_runs_it(inference_model, example, error, tmp_path):
    savedmodel.write(tmp_path / "folder", inference_model())
    images, expected = example()
    np.save(tmp_path / "images.npy", images[:2])
    arguments = [tmp_path / name for name in ("folder", "images.npy", "result.npy")]
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert error(np.load(arguments[-1]), expected[:2]) < 1e-5


def test_what_tensorflow_cannot_write_is_an_os_error(inference_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        savedmodel.write(tmp_path / "file" / "folder", inference_model())
