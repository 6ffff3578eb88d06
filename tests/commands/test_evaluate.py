"""`cnx2 evaluate` on sets other than the run's own, and on data that the checkpoint does not fit."""

import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.cli import main
from cnx2_jax.configuration import defaults, use_digits
from cnx2_jax.tasks import base
from cnx2_jax.train import checkpoint
from cnx2_jax.train.state import split

NAMES = ("n01", "n02", "n03")


def run(*arguments):
    try:
        return main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def config():
    values = defaults("classify")
    use_digits(values)
    values.image_size = (16, 16)
    values.batch_size = 8
    values.model.depths, values.model.dims = (1, 1, 1, 1), (4, 4, 8, 8)
    return values


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of a classifier that takes everything for class 1."""
    _, params = split(base.build(config(), len(NAMES), nnx.Rngs(0)))
    params["head.bias"] = params["head.bias"].at[:].set(np.array([0, 100, 0], np.float32))
    folder = tmp_path_factory.mktemp("checkpoints") / "one"
    checkpoint.write(folder, params, base.make_card(config(), NAMES))
    return folder


def save(root, name, count):
    for index in range(count):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 50 * index).save(root / name / f"{index}.png")


def test_sets_in_one_line(stored, tmp_path, capfd):
    save(tmp_path / "sketch", "n02", 3)
    save(tmp_path / "sketch", "n03", 1)
    save(tmp_path / "a", "n01", 1)
    save(tmp_path / "a", "n03", 1)  # without the class that it takes everything for
    sets = ["--set", f"imagenet-sketch={tmp_path / 'sketch'}", "--set", f"imagenet-a={tmp_path / 'a'}"]
    assert run("--checkpoint", stored, *sets) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result["checkpoint"] == str(stored)
    assert result["imagenet-sketch"]["accuracy"] == 0.75
    assert result["imagenet-a"]["accuracy"] == 0.5
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["imagenet-sketch", "imagenet-a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate needs --workdir, or --set NAME=FOLDER with --checkpoint"),
        (["--set", "imagenet-a={tmp}"], "--set needs --checkpoint or --workdir"),
        (["--checkpoint", "{stored}", "--set", "imagenet-a"], "--set imagenet-a needs a place"),
        (["--checkpoint", "{stored}", "--set", "imagenet={tmp}"], "unknown set 'imagenet'; did you mean"),
        (["--checkpoint", "{stored}", "--set", "imagenet-a={tmp}/no"], "'{tmp}/no' is not a folder"),
        (["--checkpoint", "{stored}", "--set", "imagenet-c={tmp}"], "it is not ImageNet-C"),
        (
            ["--checkpoint", "{stored}", "--set", "imagenet-a={tmp}", "--set", "imagenet-a=x"],
            "is given twice",
        ),
        (
            ["--checkpoint", "{stored}", "--set", "imagenet-a=tfds:{tmp}"],
            "'imagenet_a' is not prepared in '{tmp}'",
        ),
    ],
)
def test_mistakes(stored, tmp_path, capfd, arguments, message):
    words = {"tmp": tmp_path, "stored": stored}
    assert run(*(word.format(**words) for word in arguments)) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert message.format(**words) in captured.err


def test_checkpoint_of_other_classes_is_refused(stored, tmp_path, capfd):
    save(tmp_path / "images", "n01", 4)
    save(tmp_path / "images", "n02", 4)
    save(tmp_path / "images", "n04", 4)
    workdir = tmp_path / "run"
    workdir.mkdir()
    values = config()
    values.data.update({"source": "folder", "root": str(tmp_path / "images")})
    (workdir / "config.json").write_text(json.dumps(values.to_dict()))
    assert run("--workdir", workdir, "--checkpoint", stored) == 2
    assert "was trained on other classes: class 2 is 'n03' there and 'n04' here" in capfd.readouterr().err
    save(tmp_path / "images", "n05", 4)
    assert run("--workdir", workdir, "--checkpoint", stored) == 2
    assert "class 2 is 'n03' there" in capfd.readouterr().err


def test_unreadable_images_are_left_out_and_counted(stored, tmp_path, capfd):
    save(tmp_path / "images", "n01", 5)
    save(tmp_path / "images", "n02", 5)
    save(tmp_path / "images", "n03", 5)
    val = tmp_path / "val"
    save(val, "n02", 3)
    save(val, "n03", 1)
    (val / "n03" / "broken.png").write_bytes(b"")
    workdir = tmp_path / "run"
    workdir.mkdir()
    values = config()
    values.data.update({"source": "folder", "root": str(tmp_path / "images")})
    values.data.update({"val_source": "folder", "val_root": str(val)})
    (workdir / "config.json").write_text(json.dumps(values.to_dict()))
    arguments = ["--workdir", workdir, "--checkpoint", stored]
    assert run(*arguments) == 2
    assert "broken.png' is not a readable" in capfd.readouterr().err
    assert run(*arguments, "--config.data.unreadable=skip", "--config.data.max_unreadable=0.5") == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result["accuracy"] == 0.75 and result["unreadable"] == 0.2
    assert captured.err == f"skipped: image '{val / 'n03' / 'broken.png'}' cannot be read\n"
