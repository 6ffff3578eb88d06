"""`cnx2 evaluate` on ImageNet's other sets, by nearest neighbours, and on data of other classes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.data.images import ImageData, eval_batches
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import split
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, models, weights

NAMES = ("n01", "n02", "n03")


def run(*arguments):
    try:
        return main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def config(task="classify"):
    values = defaults(task)
    use_digits(values)
    values.image_size = (16, 16)
    values.batch_size = 8
    values.model.depths, values.model.dims = (1, 1, 1, 1), (4, 4, 8, 8)
    if task == "pretrain":
        values.model.decoder_dim = 8
    return values


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of a classifier that predicts class 1 for every image."""
    _, params = split(models.build(config(), len(NAMES), nnx.Rngs(0)))
    params["head.bias"] = params["head.bias"].at[:].set(np.array([0, 100, 0], np.float32))
    folder = tmp_path_factory.mktemp("checkpoints") / "one"
    checkpoint.write(folder, params, make_metadata(config(), NAMES))
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
        (["--set", "imagenet-a={tmp}"], "--set needs a model; give --checkpoint or --workdir"),
        (["--checkpoint", "{stored}", "--set", "imagenet-a"], "--set imagenet-a needs a folder"),
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
        (["--checkpoint", "{stored}", "--knn", "20"], "evaluate needs --workdir"),
        (
            ["--checkpoint", "{stored}", "--knn", "20", "--set", "imagenet-a={tmp}"],
            "--knn uses the run's own images and excludes --set; give only one",
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


# By neighbours.


@pytest.fixture(scope="module")
def runs(tmp_path_factory, random_params):
    """Workdirs of pretraining on digits and of a classifier, both with random parameters."""
    found = {}
    for task, classes in (("pretrain", ()), ("classify", tuple("0123456789"))):
        found[task] = workdir = tmp_path_factory.mktemp("runs") / task
        values = config(task)
        empty = nnx.eval_shape(lambda: models.build(values, len(classes), nnx.Rngs(0)))  # noqa: B023 - called here
        _, params = split(random_params(empty, 0))
        checkpoint.write(workdir / "checkpoints" / "4", params, make_metadata(values, classes))
        (workdir / "config.json").write_text(json.dumps(values.to_dict()))
    return found


@pytest.mark.parametrize("kind", ["pretrain", "classify"])
def test_neighbours_of_validation_images_are_training_images(runs, kind, capfd):
    assert run("--workdir", runs[kind], "--knn", 20, "--config.batch_size=100") == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result.keys() == {"checkpoint", "knn_accuracy", "knn_top5_accuracy"}
    assert result["checkpoint"] == str(runs[kind] / "checkpoints" / "4")

    model, values, _ = weights.load(runs[kind])
    pooled = jax.jit(lambda model, x: model.pooled(x))
    data, encoder, sets = ImageData(values), models.without_decoder(model), []
    for source in (data.train, data.val):
        batches = [b["image"][b["mask"]] for b in eval_batches(source, values)]
        images = normalise(jnp.asarray(np.concatenate(batches)), values.data.mean, values.data.std)
        sets.append((np.asarray(pooled(encoder, images)), source.labels))
    assert [len(labels) for _, labels in sets] == [1438, 359]
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    # Of 359, none or one that a last bit decides.
    assert result["knn_accuracy"] == pytest.approx(model.fit(*sets[0]).score(*sets[1]), abs=1.5 / 359)
    assert 0.15 < result["knn_accuracy"] < result["knn_top5_accuracy"] <= 1  # 0.1 is chance


def test_neighbours_need_classes_and_so_many_images(runs, tmp_path, capfd):
    for index in range(10):
        Image.new("L", (16, 16), 20 * index).save(tmp_path / f"{index}.png")
    folder = ["--config.data.source=folder", f"--config.data.root={tmp_path}"]
    for arguments, message in (
        (
            ["--knn", 20, *folder],
            f"with data.root '{tmp_path}' has none; put the images of each class",
        ),
        (["--knn", 1001], "--knn 1001 must be at least 1 and at most 1000; 20 is usual"),
        (["--knn", 0], "--knn 0 must be at least 1"),
    ):
        assert run("--workdir", runs["pretrain"], *arguments) == 2
        captured = capfd.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
        assert message in captured.err


# Reports, and averages over views.


def test_a_report_of_a_classifier(runs, tmp_path, capfd):
    folder = tmp_path / "report"
    assert run("--workdir", runs["classify"], "--config.batch_size=100") == 0
    plain = json.loads(capfd.readouterr().out)
    assert run("--workdir", runs["classify"], "--report", folder, "--config.batch_size=100") == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)
    assert {name: found[name] for name in plain} == pytest.approx(plain)
    assert 0 < found["ece"] <= found["mce"] <= 1
    rows = [line.split(",") for line in (folder / "classes.csv").read_text().splitlines()]
    assert rows[0] == ["class", "f1", "precision", "recall", "support"]
    assert [row[0] for row in rows[1:]] == [*"0123456789"]
    support, recall = (np.array([float(row[place]) for row in rows[1:]]) for place in (4, 3))
    assert support.sum() == 359
    assert (support * recall).sum() / 359 == pytest.approx(found["accuracy"], abs=1e-4)
    written = {path.name for path in folder.iterdir()}
    tables = {f"{name}.{end}" for name in ("classes", "calibration", "confusions") for end in ("md", "csv")}
    plots = {"classes.png", "calibration.png", "confusion.png"}
    assert written - plots == tables | {"mistakes.png"}
    # Six images of 96 pixels in each of four rows.
    assert Image.open(folder / "mistakes.png").size == (4 + 6 * 100, 4 + 4 * (96 + 20 + 4))
    assert len(captured.err.splitlines()) == 3  # a line per plot, drawn or not
    assert run("--workdir", runs["classify"], "--report", folder) == 2
    assert "exists already" in capfd.readouterr().err


def test_views_are_averaged_where_the_task_can(runs, capfd):
    found = []
    for options in ([], ["--tta", "flip"], ["--config.eval_flip=true"]):
        assert run("--workdir", runs["classify"], "--config.batch_size=100", *options) == 0
        found.append(json.loads(capfd.readouterr().out))
    assert found[0]["loss"] != found[1]["loss"] and found[1] == found[2]
    for kind, options, message in (
        ("pretrain", ["--tta", "flip"], "--tta flip: task 'pretrain' does not average views of an image"),
        ("pretrain", ["--report", "x"], "--report: task 'pretrain' has nothing to report; leave it out"),
        (
            "classify",
            ["--tta", "flip", "--knn", "3"],
            "--tta is about the run's own images and excludes --set",
        ),
    ):
        assert run("--workdir", runs[kind], *options) == 2
        assert message in capfd.readouterr().err
