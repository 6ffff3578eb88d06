"""Weights to and from real PyTorch files and the real transformers."""

import argparse
import collections
import datetime
import functools
import os
import pathlib
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.data.images import preprocess_files
from cnx2_jax.errors import UserError
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.files import read_tensors
from cnx2_jax.interop.names import from_torch, to_torch
from cnx2_jax.interop.safetensors import run_huggingface, write
from cnx2_jax.models import VARIANTS, create_model
from cnx2_jax.tasks import defaults

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BOUND = 1e-5  # largest absolute difference over largest absolute value, in float32


pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.slow]


def without_weights(variant):
    """Returns transformers' classifier with its names and shapes but without numbers."""
    chosen = VARIANTS[variant]
    config = transformers.ConvNextV2Config(
        depths=list(chosen.depths), hidden_sizes=list(chosen.dims), num_labels=10, layer_norm_eps=1e-6
    )
    with torch.device("meta"):
        return transformers.ConvNextV2ForImageClassification(config)


def hugging_face(variant):
    """Returns transformers' classifier with random weights; nothing is initialised twice."""
    model = without_weights(variant).to_empty(device="cpu").eval()
    pool = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        # From one stock of numbers, as drawing a billion takes most of a test; sizes as in fill_randomly.
        values = np.resize(np.roll(pool, index), parameter.shape)
        if name.endswith("bias"):
            values *= 0.2
        elif parameter.ndim == 1:  # of a LayerNorm
            values = 1 + 0.2 * values
        else:
            values *= 0.5 if ".grn." in name else parameter[0].numel() ** -0.5
        parameter.data = torch.from_numpy(values)
    return model


def filled(build, params):
    """Returns the module of `build` with these parameters."""
    model = nnx.eval_shape(build)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    values = [(path, leaf.replace(jnp.asarray(params[".".join(map(str, path))]))) for path, leaf in flat]
    nnx.update(model, nnx.from_flat_state(values))
    return model


DEEP = ("atto", "nano", "tiny", "base")  # one of each depth; the other variants differ from these in width


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in DEEP])
def test_names_and_shapes_of_transformers(variant, parameters):
    create = functools.partial(create_model, f"convnextv2_{variant}", num_classes=10)
    ours = parameters(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))
    found = to_torch({name: np.zeros(leaf.shape, np.uint8) for name, leaf in ours.items()}, "huggingface")
    expected = {name: tuple(value.shape) for name, value in without_weights(variant).state_dict().items()}
    assert {name: value.shape for name, value in found.items()} == expected


@pytest.mark.parametrize("variant", DEEP)
def test_every_depth_of_transformers(variant, error):
    """In and out again: the same bits, names and shapes. In: the same logits."""
    theirs = hugging_face(variant)
    images = np.random.default_rng(1).standard_normal((1, 64, 64, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    imported = from_torch(tensors, "transformers")
    assert (imported.variant, imported.num_classes) == (variant, 10)

    back = to_torch(imported.params, "huggingface")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    del back, tensors, theirs
    create = functools.partial(create_model, f"convnextv2_{variant}", num_classes=10)
    model = filled(lambda: create(rngs=nnx.Rngs(0)), imported.params)
    del imported
    found = jax.jit(lambda model, images: model(images))(model, jnp.asarray(images))
    assert error(found, expected) < BOUND


@pytest.mark.parametrize("classes", [0, 3])
def test_transformers_runs_what_is_written(tmp_path, build, parameters, error, classes):
    create = functools.partial(create_model, "convnextv2_atto", num_classes=classes)
    model = build(create)
    params = {name: np.asarray(leaf[...]) for name, leaf in parameters(model).items()}
    # Small enough that an epsilon of 1e-12 in the final norm, transformers' default, would show.
    params["stages.3.1.pwconv2.kernel"] = params["stages.3.1.pwconv2.kernel"] * 0
    names = ("cat", "dog", "newt")[:classes]
    write(tmp_path / "model", params, Facts(names, (64, 64), 0.875, (0.5,) * 3, (0.2,) * 3), "huggingface")
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    expected = filled(lambda: create(rngs=nnx.Rngs(0)), params)(jnp.asarray(images))
    assert error(run_huggingface(tmp_path / "model", images), expected) < BOUND
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.layer_norm_eps == 1e-6
    if classes:
        assert config.id2label == dict(enumerate(names)) and config.label2id["newt"] == 2


@pytest.mark.parametrize(("size", "picture"), [(64, (100, 140)), (384, (400, 300))])
def test_transformers_prepares_images_as_we_do(tmp_path, build, parameters, size, picture):
    """Shrunk and cut below 384 px, warped from there on; differences of a grey level are of rounding."""
    model = build(functools.partial(create_model, "convnextv2_atto", num_classes=0))
    params = {name: np.asarray(leaf[...]) for name, leaf in parameters(model).items()}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    write(tmp_path / "model", params, Facts((), (size, size), 0.8, mean, std), "huggingface")
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*picture, 3), np.uint8)).save(path)
    config = defaults("classify")
    config.image_size, config.data.eval_crop = (size, size), 0.8
    ours = preprocess_files([path], config)[0]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    found = np.asarray(processor(Image.open(path), return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose((found * std + mean) * 255, ours, atol=1.01)


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2], dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE},
        {"state_dict": STATE},
        {"model": STATE, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
        {"model": {"a": torch.zeros(1)}, "model_ema": STATE, "scaler": {}},
    ],
    ids=["plain", "model", "state_dict", "training", "averaged"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(tmp_path, content, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_tensors(path)
    assert found.keys() == STATE.keys()
    assert all(value.dtype == np.float32 for value in found.values())
    np.testing.assert_array_equal(found["a.weight"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(found["b"], [1.5, -2])


LAUNCHED = argparse.Namespace(  # as the official submitit launchers leave it, and numbers beside
    job_dir=pathlib.PosixPath("/checkpoint/user/experiments/%j"),
    output_dir=pathlib.PosixPath("/checkpoint/user/experiments/7"),
    log_dir=pathlib.PosixPath("relative/7"),
    pure=[pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:/a")],
    dist_url="file:///checkpoint/user/experiments/1_init",
    opt_betas=None,
    lr=2.4e-3,
    gpu=0,
    mixup_modes=("a", {"b"}),
    accuracy=np.float64(83.5),
    counts=(np.int64(3), np.float32(1.5), np.bool_(True)),
    history=collections.OrderedDict(loss=[1.0, 0.5]),
)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_the_official_launchers(tmp_path, zipped):
    """Their `args` hold paths."""
    path = tmp_path / "checkpoint-99.pth"
    content = {"model": STATE, "epoch": 99, "scaler": {}, "args": LAUNCHED}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(read_tensors(path)["b"], [1.5, -2])


@pytest.mark.parametrize("module", ["pathlib._local", "pathlib"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
def test_paths_of_other_pythons_and_platforms(tmp_path, module, kind):
    """Python 3.13 names another module, and WindowsPath cannot be made here; both are read."""
    path = tmp_path / "model.pt"
    place = type(kind, (), {"__reduce__": lambda self: (type(self), ("a", "b"))})
    place.__module__ = module
    place.__qualname__ = kind
    torch.save({"model": STATE, "args": place()}, path, pickle_module=by_name(place))
    assert read_tensors(path).keys() == STATE.keys()


def by_name(place):
    """Returns a pickle module that writes `place` by its name without looking it up."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is place:
                self.write(f"c{obj.__module__}\n{obj.__qualname__}\n".encode())
            else:
                super().save_global(obj, name)

        dispatch = {**pickle._Pickler.dispatch, type: save_global}  # noqa: RUF012

    return types.SimpleNamespace(**{**vars(pickle), "Pickler": Pickler})


def test_an_array_of_objects_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": STATE, "args": np.array([{}], object)}, path)
    assert "asks for numpy" in refusal(path)


def refusal(path):
    with pytest.raises(UserError) as raised:
        read_tensors(path)
    message = str(raised.value)
    assert f"'{path}'" in message and "\n" not in message
    return message


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zipped", "legacy", "pickle"])
def test_a_malicious_pickle_runs_nothing(tmp_path, form):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    content = {"model": STATE, "x": Malicious(f"touch {trace}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": Malicious(f"touch {trace}")}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zipped")
    assert "asks for posix.system" in refusal(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists()  # so it would have


def test_other_objects(tmp_path):
    torch.save({"model": STATE, "when": datetime.datetime.now()}, tmp_path / "a.pt")
    assert "asks for datetime.datetime" in refusal(tmp_path / "a.pt")
    torch.save({**STATE, "epoch": 3}, tmp_path / "b.pt")
    assert "its entry 'epoch' is not a plain tensor" in refusal(tmp_path / "b.pt")
    torch.save([torch.zeros(1)], tmp_path / "c.pt")
    assert "holds no state dict" in refusal(tmp_path / "c.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged" in refusal(path)
    path.write_bytes(b"hello " * 100)
    assert "is damaged, or not a PyTorch file of tensors" in refusal(path)
