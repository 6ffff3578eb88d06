"""`cnx2 export`: every format in its runtime, and one line for every mistake."""

import functools
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.models.state import split
from cnx2_jax.tasks import defaults, models, weights

NAMES = ("cat", "dog", "owl")


def run(*arguments):
    try:
        return main(["export", *map(str, arguments)])
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module")
def stored(random_params, tmp_path_factory):
    """A folder with checkpoints of a classifier that computes in bfloat16, and of pretraining."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for task, names in (("classify", NAMES), ("pretrain", ())):
        config = defaults(task)
        config.image_size = (32, 64)
        config.model.variant = "custom"
        config.model.depths, config.model.dims = (1, 1, 1, 1), (8, 8, 16, 16)
        if task == "classify":
            config.model.dtype = "bfloat16"
        else:
            config.model.decoder_dim = 8
        empty = nnx.eval_shape(lambda: models.build(config, len(names), nnx.Rngs(0)))  # noqa: B023 - called here
        params = split(random_params(empty, 0))[1]
        checkpoint.write(folder / task, params, make_metadata(config, names))
    return folder


@pytest.fixture(scope="module")
def of_arrays(random_params, tmp_path_factory):
    """A folder with checkpoints of several labels and of numbers, for two chosen bands of 16 bits."""
    folder = tmp_path_factory.mktemp("arrays")
    more = {
        "multilabel": {"threshold": 0.3},
        "regress": {"standards": {"mean": [40.0, -3.0, 0.5], "deviation": [7.0, 2.0, 0.1]}},
    }
    for task, facts in more.items():
        config = defaults(task)
        config.image_size = (32, 32)
        config.model.variant = "custom"
        config.model.depths, config.model.dims = (1, 1, 1, 1), (8, 8, 16, 16)
        config.model.in_chans = 2
        config.data.update({"source": "arrays", "dtype": "uint16", "bands": "B2,B3,B4", "use_bands": "B4,B2"})
        config.data.update({"mean": (3000.0, 1200.0), "std": (800.0, 300.0)})
        empty = nnx.eval_shape(lambda: models.build(config, len(NAMES), nnx.Rngs(0)))  # noqa: B023 - called here
        params = split(random_params(empty, 0))[1]
        checkpoint.write(folder / task, params, {**make_metadata(config, NAMES), **facts})
    return folder


@pytest.mark.parametrize("task", ["multilabel", "regress"])
@pytest.mark.parametrize("name", ["savedmodel", "onnx"])
def test_several_labels_and_numbers_of_arrays(name, task, of_arrays, tmp_path, capfd, error):
    if name == "onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    assert run("--checkpoint", of_arrays / task, "--format", name, "--out", out) == 0
    result = json.loads(capfd.readouterr().out)
    assert 0 <= result["max_difference"] < 1e-5 * result["largest"]
    normal = np.random.default_rng(2).standard_normal((2, 32, 32, 2), np.float32)
    expected = jax.jit(lambda model, x: model(x))(weights.load(of_arrays / task)[0], normal)
    if task == "regress":  # in the targets' own units
        expected = expected * np.array([7.0, 2.0, 0.1]) + np.array([40.0, -3.0, 0.5])
    assert error(RUNTIMES[name](out, normal), expected) < 1e-5
    if name == "onnx":
        (entry,) = onnx.load(out).graph.input
        assert "(x - mean) / std with mean (3000.0, 1200.0)" in entry.doc_string
        assert entry.doc_string.endswith("of images of uint16")


def test_weights_of_arrays_state_the_statistics_of_their_bands(of_arrays, tmp_path, capfd):
    out = tmp_path / "out"
    assert run("--checkpoint", of_arrays / "multilabel", "--format", "safetensors", "--out", out) == 0
    assert "neither library prepares arrays of uint16: config.json has the mean" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    again = tmp_path / "again"
    assert main(["convert", "--from", str(out / "model.safetensors"), "--to", str(again)]) == 0
    data = weights.load(again)[1].data
    assert (data.source, data.dtype, data.bands) == ("arrays", "uint16", "B4,B2")
    assert (data.mean, data.std) == ((3000.0, 1200.0), (800.0, 300.0))


def images(count):
    return np.random.default_rng(1).integers(0, 256, (count, 32, 64, 3), np.uint8)


def normal(pictures):
    data = defaults("classify").data
    return ((pictures / 255 - np.array(data.mean)) / np.array(data.std)).astype(np.float32)


def in_stablehlo(path, x):
    return export.deserialize(bytearray(path.read_bytes())).call(x)


def in_tensorflow(path, x):
    loaded = tf.saved_model.load(str(path))
    return next(iter(loaded.signatures["serving_default"](images=tf.constant(x)).values()))


def in_onnxruntime(path, x):
    return pytest.importorskip("onnxruntime").InferenceSession(path).run(None, {"images": x})[0]


RUNTIMES = {"stablehlo": in_stablehlo, "savedmodel": in_tensorflow, "onnx": in_onnxruntime}


@functools.cache
def in_float32(folder):
    """The results of a checkpoint for `images(2)`, computed in float32."""
    model, config, names = weights.load(folder)
    config.model.dtype = "float32"
    fine = nnx.eval_shape(lambda: models.build(config, len(names), nnx.Rngs(0)))
    nnx.update(fine, nnx.state(model))
    return jax.jit(lambda model, x: model(x))(models.without_decoder(fine), normal(images(2)))


@pytest.mark.parametrize("uint8", [False, True], ids=["float32", "uint8"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_every_format_gives_what_the_checkpoint_gives(name, uint8, stored, tmp_path, capfd, error):
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    task = "pretrain" if uint8 else "classify"
    options = ["--input", "uint8"] if uint8 else []
    out = tmp_path / "new" / "out"
    assert run("--checkpoint", stored / task, "--format", name, "--out", out, *options) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    result = json.loads(line)
    assert result.keys() == {"out", "format", "runtime", "max_difference", "largest"}
    assert (result["out"], result["format"]) == (str(out), name)
    assert 0 <= result["max_difference"] < 1e-5 * result["largest"]
    assert list(out.parent.iterdir()) == [out]

    expected, pictures = in_float32(stored / task), images(2)
    found = RUNTIMES[name](out, pictures if uint8 else normal(pictures))
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_goes_on_as_a_checkpoint(dtype, stored, tmp_path, capfd):
    given = ["--dtype", dtype] if dtype == "bfloat16" else []
    for task in ("classify", "pretrain"):
        out = tmp_path / task
        assert run("--checkpoint", stored / task, "--format", "orbax", "--out", out, *given) == 0
        result = json.loads(capfd.readouterr().out)
        assert result["runtime"].startswith("orbax.checkpoint ")
        assert (result["max_difference"] == 0) == (dtype == "float32")
        ours, theirs = (split(weights.load(path)[0])[1] for path in (stored / task, out))
        assert ours.keys() == theirs.keys()  # the decoder's too
        for name, value in ours.items():
            assert theirs[name].dtype == np.float32
            np.testing.assert_array_equal(theirs[name], value.astype(dtype).astype(np.float32))
    Image.fromarray(images(1)[0]).save(tmp_path / "image.png")
    assert main(["predict", "--checkpoint", str(tmp_path / "classify"), str(tmp_path / "image.png")]) == 0
    assert {line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]} == set(NAMES)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_a_package(missing, stored, tmp_path, capfd, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    out = tmp_path / "out"
    code = run("--checkpoint", stored / "classify", "--format", "onnx", "--out", out)
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert f"'{missing}' " in line and "; pip install 'cnx2_jax[onnx]'" in line
    if missing == "onnx":  # nothing can be written
        assert (code, captured.out) == (2, "") and not out.exists()
    else:  # it can, and cannot be checked
        assert code == 0 and json.loads(captured.out)["runtime"] is None and out.is_file()


MISTAKES = {
    "dtype elsewhere": ("--format onnx --out {tmp}/x --dtype bfloat16", "--dtype is for --format orbax, not"),
    "input elsewhere": ("--format orbax --out {tmp}/x --input uint8", "--input is for --format stablehlo, "),
    "naming elsewhere": (
        "--format onnx --out {tmp}/x --naming timm",
        "--naming is for --format safetensors, ",
    ),
    "onto something": ("--format stablehlo --out {stored}/classify", "'{stored}/classify' exists already"),
    "below a file": ("--format savedmodel --out {tmp}/file/x", "'{tmp}/file' is not a folder"),
    "unknown input": ("--format onnx --out {tmp}/x --input int8", "int8"),
    "no such checkpoint": ("--format onnx --out {tmp}/x --checkpoint {tmp}/no", "'{tmp}/no' does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing(name, stored, tmp_path, capfd):
    if "onnx" in MISTAKES[name][0]:
        pytest.importorskip("onnx")
    (tmp_path / "file").write_text("mine")
    words = {"tmp": tmp_path, "stored": stored}
    line, message = (text.format(**words) for text in MISTAKES[name])
    assert run("--checkpoint", stored / "classify", *line.split()) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("task", ["classify", "pretrain"])
@pytest.mark.parametrize("naming", ["huggingface", "timm"])
def test_weights_for_other_libraries(naming, task, stored, tmp_path, capfd):
    out = tmp_path / "out"
    options = ["--naming", naming] if naming == "timm" else []
    assert run("--checkpoint", stored / task, "--format", "safetensors", "--out", out, *options) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    package = {"huggingface": "transformers", "timm": "timm"}[naming]
    if importlib.util.find_spec(package) is None:
        assert result["runtime"] is None
        assert (
            f"not checked: '{package}' cannot be imported; pip install 'cnx2_jax[{package}]'" in captured.err
        )
    else:
        assert result["runtime"].startswith(f"{package} ")
        assert 0 <= result["max_difference"] < 1e-5 * result["largest"]
    # Whatever the runtime, what is there comes back as it was.
    again = tmp_path / "again"
    assert main(["convert", "--from", str(out / "model.safetensors"), "--to", str(again)]) == 0
    assert json.loads(capfd.readouterr().out)["classes"] == (len(NAMES) if task == "classify" else 0)
    ours, config, names = weights.load(stored / task)
    theirs, other, found_names = weights.load(again)
    ours, theirs = split(models.without_decoder(ours))[1], split(theirs)[1]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name], value, err_msg=name)
    assert found_names == names
    assert tuple(other.data.mean) == pytest.approx(tuple(config.data.mean))
