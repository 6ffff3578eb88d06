"""`cnx2 analyse` on checkpoints of several tasks, and its mistakes."""

import json
import sys

import numpy as np
import pytest
import tifffile
from flax import nnx
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.models.state import split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import TASKS, defaults
from cnx2_jax.tasks.base import Described, Task

LAYERS = [f"stages.{stage}.0{end}" for stage in range(4) for end in (".grn", "")]


class NoEncoder(Task, name="no_encoder"):
    def init(self, rngs):
        return nnx.Linear(2, 2, rngs=rngs)


def run(*arguments):
    try:
        return main(["analyse", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def write(folder, task, fill=None, class_names=(), **data):
    """Writes a checkpoint of a tiny model of a task, and returns its folder."""
    config = defaults(task)
    use_digits(config)
    config.image_size = (16, 16)
    config.model.depths, config.model.dims = (1, 1, 1, 1), (4, 4, 8, 8)
    config.data.update(data.pop("data", {}))
    config.model.update(data)
    make = lambda: TASKS[task](config, data=Described(class_names=class_names)).init(nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(make)
    _, params = split(fill(model, 0) if fill else make())
    checkpoint.write(folder, params, make_metadata(config, class_names))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def pretrained(folder, random_params):
    return write(folder / "pretrained", "pretrain", random_params, decoder_dim=8)


@pytest.fixture(scope="module")
def classifier(folder, random_params):
    return write(folder / "classifier", "classify", random_params, tuple("0123456789"))


def test_two_checkpoints_side_by_side(pretrained, classifier, tmp_path, capfd):
    out = tmp_path / "out"
    both = ["--checkpoint", pretrained, "--checkpoint", classifier]
    found = run(*both, "--out", out, "--images", 40, "--layer", "stages.1.0")
    captured = capfd.readouterr()
    assert found == 0, captured.err
    header, _, *rows = captured.out.splitlines()
    assert header.split("|")[1].strip() == "layer" and "B selectivity" in header
    assert [row.split("|")[1].strip() for row in rows] == LAYERS[::2] + LAYERS[1::2]
    assert f"A: {pretrained}, task pretrain, 40 images" in captured.err
    stored = json.loads((out / "analysis.json").read_text())["checkpoints"]
    assert [(each["label"], each["task"], each["images"]) for each in stored] == [
        ("A", "pretrain", 40),
        ("B", "classify", 40),
    ]
    for each in stored:
        assert [*each["layers"]] == LAYERS
        for layer in each["layers"].values():
            assert 0 <= layer["cosine_distance"] <= 0.5
            assert 0 <= layer["selectivity"] <= 1  # the digits have labels, whatever the task
    names = {path.name for path in out.iterdir()}
    assert {"analysis.json", "layers.md", "layers.csv", "activations"} <= names
    for plot in ("cosine_distance.png", "selectivity.png"):
        assert f"drew {out / plot}" in captured.err and Image.open(out / plot).width > 500
    pictures = {path.name for path in (out / "activations" / "B").iterdir()}
    assert pictures == {f"{prefix}image-{i}.png" for prefix in ("", "stages.1.0.") for i in range(4)}


def test_bands_without_labels_and_without_matplotlib(tmp_path, random_params, capfd, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(6):
        image = rng.integers(0, 9000, (16, 16, 5)).astype(np.uint16)
        tifffile.imwrite(
            tmp_path / "images" / f"{index}.tif", image, photometric="minisblack", planarconfig="contig"
        )
    data = {"source": "arrays", "root": str(tmp_path / "images"), "dtype": "uint16", "val_fraction": 0.5}
    data |= {"mean": (4500.0,) * 5, "std": (2600.0,) * 5}
    path = write(tmp_path / "five", "pretrain", random_params, decoder_dim=8, in_chans=5, data=data)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    found = run("--checkpoint", path, "--out", out)
    captured = capfd.readouterr()
    assert found == 0, captured.err
    assert "A: no selectivity, because the images do not have labels of two classes" in captured.err
    assert "no cosine_distance.png: matplotlib is not installed" in captured.err
    assert "selectivity.png" not in captured.err
    pictures = {path.name for path in (out / "activations" / "A").iterdir()}
    sheets = {f"{name}.image-{i}.png" for name in LAYERS for i in range(3)}
    assert pictures == sheets | {f"image-{i}.png" for i in range(3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint {good} --out {good}", "'{good}' exists already; nothing was overwritten"),
        ("--checkpoint {good} --out {tmp}/x --images 0", "--images 0 must be at least 1"),
        (
            "--checkpoint {good} --out {tmp}/x --layer stages.0.1",
            "checkpoint '{good}' has no layer 'stages.0.1'; did you mean",
        ),
        ("--checkpoint {tmp}/none --out {tmp}/x", "{tmp}/none"),
        (
            "--checkpoint {good} --checkpoint {bare} --out {tmp}/x",
            "checkpoint '{bare}' of task 'no_encoder' has no ConvNeXt V2 encoder to analyse",
        ),
        ("--checkpoint {good} --out {tmp}/x --config.data.no_such=1", "no_such"),
    ],
)
def test_mistakes(pretrained, folder, tmp_path, capfd, arguments, message):
    bare = folder / "bare"
    if not bare.exists():
        write(bare, "no_encoder")
    places = {"good": pretrained, "bare": bare, "tmp": tmp_path}
    assert run(*arguments.format(**places).split()) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message.format(**places) in captured.err
    assert not (tmp_path / "x").exists()
