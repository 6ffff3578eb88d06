"""Segmentation as a task: loss and scores against literal NumPy, starting weights, a run from end to end."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.metrics import evaluate
from cnx2_jax.models.resampling import resize
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.observe.timing import TIMED
from cnx2_jax.tasks import make_task, models, weights
from cnx2_jax.tasks.base import Described
from cnx2_jax.train.terms import value

SMALL = [
    "model.depths=(1,1,1,1)",
    "model.dims=(4,4,8,8)",
    "model.channels=8",
    "model.auxiliary_channels=4",
    "model.pool_scales=(1,2)",
    "image_size=(32,48)",
    "batch_size=4",
    "total_steps=4",
    "log_steps=1",
    "optimizer.warmup_steps=1",
    "data.source=scenes:12",
]
CLASSES = ("sky", "tree", "road", "never")


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


def config(*overrides):
    return load_config("segment:digits", [f"--config.{each}" for each in [*SMALL, *overrides]])


def described(*overrides, classes=CLASSES):
    return make_task(config(*overrides), data=Described(class_names=classes))


@pytest.fixture(scope="module")
def task():
    return described("model.dropout=0", "eval_window=32", "eval_stride=20")


@pytest.fixture(scope="module")
def model(task, build):
    """A network whose running averages are not those that it starts with."""
    return build(task.init, seed=1)


def make_batch(canvas, sizes, map_canvas, map_sizes, seed=0):
    """Random images and maps, both padded; class 3 never occurs, some pixels have none."""
    rng = np.random.default_rng(seed)
    maps = rng.choice([0, 1, 2, 255], (len(sizes), *map_canvas)).astype(np.uint8)
    for each, (height, width) in zip(maps, map_sizes, strict=True):
        each[height:], each[:, width:] = 255, 255
    return {
        "image": rng.integers(0, 256, (len(sizes), *canvas, 3), np.uint8),
        "image_size": np.array(sizes, np.int32),
        "map": maps,
        "map_size": np.array(map_sizes, np.int32),
    }


def literal_losses(logits, target):
    """Cross-entropy of each pixel in float64, 0 where it has no class."""
    logits = np.asarray(logits, np.float64)
    labelled = target < logits.shape[-1]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(logs, np.where(labelled, target, 0)[..., None].astype(int), axis=-1)
    return np.where(labelled, -chosen[..., 0], 0)


def test_the_loss_is_of_all_pixels_and_both_heads(task, model):
    """mmsegmentation's `avg_non_ignore=False`: what has no class adds nothing, and counts in the mean."""
    size = (32, 48)
    batch = make_batch(size, [size, (32, 33), (20, 48)], size, [size, (32, 33), (20, 48)])
    graph, arrays = split(model)

    @jax.jit
    def run(arrays):
        images = task.normalised(batch["image"], batch["image_size"])
        logits = merge(graph, arrays)(images, None, train=True)
        keys = jax.random.split(jax.random.key(0), len(images))
        return task.loss(merge(graph, arrays), batch, keys), [resize(x, size) for x in logits], images

    (terms, metrics), (main_logits, auxiliary_logits), images = run(arrays)
    assert not np.asarray(images)[1, :, 33:].any() and not np.asarray(images)[2, 20:].any()
    target = batch["map"]
    assert float(value(terms["main_loss"])) == pytest.approx(
        literal_losses(main_logits, target).sum() / target.size, rel=1e-5
    )
    assert float(value(terms["auxiliary_loss"])) == pytest.approx(
        0.4 * literal_losses(auxiliary_logits, target).sum() / target.size, rel=1e-5
    )
    right = (np.asarray(main_logits).argmax(-1) == target).sum() / (target != 255).sum()
    assert float(value(metrics["pixel_accuracy"])) == pytest.approx(right)


def test_scores_do_not_depend_on_padding_and_equal_literal_numpy(task, model):
    sizes, map_sizes = [(33, 40), (20, 60)], [(61, 60), (25, 62)]
    batch = make_batch((40, 64), sizes, (64, 64), map_sizes)
    padded = {**batch, "mask": np.array([True, True])}
    found = evaluate(task, model, [padded, {**padded, "mask": np.array([False, True])}])

    confusion, losses = np.zeros((4, 4), int), []
    graph, arrays = split(model)
    run = jax.jit(
        lambda arrays, alone, to: task.full_logits(merge(graph, arrays), alone, jnp.array([to]), to),
        static_argnums=2,
    )
    for index in (0, 1, 1):
        (h, w), (height, width) = sizes[index], map_sizes[index]
        alone = {"image": batch["image"][index : index + 1, :h, :w], "image_size": np.array([[h, w]])}
        target = batch["map"][index, :height, :width]
        logits = np.asarray(run(arrays, alone, (height, width)))[0]
        losses.append(literal_losses(logits, target).sum() / (target != 255).sum())
        for true, predicted in zip(target.ravel(), logits.argmax(-1).ravel(), strict=True):
            if true != 255:
                confusion[true, predicted] += 1
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    occurs = union > 0
    expected = {
        "miou": (np.diag(confusion)[occurs] / union[occurs]).mean(),
        "mean_accuracy": (np.diag(confusion)[:3] / confusion.sum(1)[:3]).mean(),
        "pixel_accuracy": np.diag(confusion).sum() / confusion.sum(),
        "loss": np.mean(losses),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_scales_and_mirror_average_probabilities(model):
    task = described("model.dropout=0", "eval_window=32", "eval_flip=true", "data.eval_scales=(1.0,0.5)")
    target = [(40, 48)]
    batch = make_batch((40, 48), target, (40, 48), target)
    small = make_batch((32, 32), [(20, 24)], (1, 1), [(1, 1)], seed=1)
    batch |= {"image_1": small["image"], "image_1_size": small["image_size"]}
    views = described("model.dropout=0", "eval_window=32")
    run = jax.jit(
        lambda task, image, size: jax.nn.softmax(
            task.full_logits(model, {"image": image, "image_size": size}, jnp.array(target), target[0])
        ),
        static_argnums=0,
    )
    shares = []
    for name in ("image", "image_1"):
        images, (height, width) = batch[name], batch[f"{name}_size"][0]
        shares.append(run(views, images, batch[f"{name}_size"]))
        mirrored = images.copy()
        mirrored[:, :height, :width] = images[:, :height, :width][:, :, ::-1]
        shares.append(run(views, mirrored, batch[f"{name}_size"])[:, :, ::-1])
    logits = jax.jit(lambda batch: task.full_logits(model, batch, batch["map_size"], target[0]))(batch)
    np.testing.assert_allclose(np.exp(logits), np.mean(shares, axis=0), atol=1e-5)


# Starting weights.


@pytest.mark.parametrize("kind", ["classify", "pretrain", "segment"])
def test_starting_weights(kind, build, tmp_path):
    """The encoder of any checkpoint; from another segmenter all but classifiers of other classes."""
    task = described(f"init_from={tmp_path / 'stored'}")
    theirs = load_config(
        {"classify": "finetune:digits", "pretrain": "pretrain:scenes"}.get(kind, "segment:digits")
    )
    for key in ("depths", "dims", "patch_size", "in_chans"):
        theirs.model[key] = task.config.model[key]
    if kind == "segment":
        made = build(described(classes=("one", "two")).init, seed=5)
        theirs.model.update(task.config.model)
    else:
        made = build(lambda rngs: models.build(theirs, 7, rngs), seed=5)
    checkpoint.write(tmp_path / "stored", split(made)[1], make_metadata(theirs, ("one", "two")))
    fresh = split(build(task.init))[1]
    started = task.start(fresh)
    assert started.keys() == fresh.keys()
    prefix = {"classify": "", "pretrain": "encoder.", "segment": "backbone."}[kind]
    stored = split(made)[1]
    for name, array in started.items():
        part = name.removeprefix("backbone.")
        encoder = part.startswith(("downsample_layers.", "stages."))
        if encoder or (kind == "segment" and ".conv_seg." not in name):
            source = stored[prefix + part if encoder else name]
        else:
            source = fresh[name]
        np.testing.assert_array_equal(array, source, err_msg=name)


# Errors.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval_window=40"], "image size 40x40 is not a multiple of the stride, for eval_window, 16"),
        (["eval_window=32", "eval_stride=33"], "eval_stride 33 must be at most the window, 32x32"),
        (["batch_size=1"], "batch_size 1 with accumulation_steps 1: BatchNorm needs at least two images"),
        (["data.ratio_range=(2.0,1.0)"], r"data.ratio_range \(2.0, 1.0\) must be two positive numbers"),
        (["data.source=digits"], "data.source 'digits' has no maps"),
    ],
)
def test_settings_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        make_task(config(*overrides))


# A run.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("segment") / "run"
    overrides = [f"--config.{each}" for each in [*SMALL, "checkpoint_steps=2"]]
    command = ["train", "--config", "segment:digits", "--workdir", str(workdir), *overrides]
    assert main(command) == 0
    return workdir, command


def rows(workdir):
    found = read_metrics(workdir / "metrics.jsonl")
    return [{name: number for name, number in row.items() if not TIMED.fullmatch(name)} for row in found]


def test_what_a_run_leaves(run):
    workdir, _ = run
    last = rows(workdir)[-1]
    assert last.keys() == {"step", "split", "miou", "mean_accuracy", "pixel_accuracy", "loss"}
    assert {"main_loss", "auxiliary_loss", "pixel_accuracy"} <= rows(workdir)[0].keys()
    picture = np.asarray(Image.open(workdir / "segmentations" / "00000004.png"))
    assert picture.shape[2] == 3 and picture.std() > 10


def test_a_killed_run_resumes_bit_for_bit(run, tmp_path):
    """Running averages of BatchNorm included."""
    workdir, command = run
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert main([str(again) if each == str(workdir) else each for each in command]) == 0
    assert rows(again) == rows(workdir)
    ours, theirs = (checkpoint.read_params(path / "checkpoints" / "4") for path in (again, workdir))
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("bn.var") for name in ours)
    for name, array in theirs.items():
        assert np.asarray(array).tobytes() == np.asarray(ours[name]).tobytes(), name


def test_evaluate_gives_the_same(run, capsys):
    workdir, _ = run
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = rows(workdir)[-1]
    assert {name: found[name] for name in ("miou", "loss")} == pytest.approx(
        {name: last[name] for name in ("miou", "loss")}, rel=1e-5
    )


def test_a_report_of_every_class(run, tmp_path, capsys):
    workdir, _ = run
    report = tmp_path / "report"
    assert main(["evaluate", "--workdir", str(workdir), "--report", str(report)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = (report / "classes.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0] == ["class", "iou", "accuracy", "share"]
    assert [row[0] for row in table[2:]] == ["background", *"0123456789"]
    ious = [float(row[1]) for row in table[2:] if row[1]]
    assert np.mean(ious) == pytest.approx(found["miou"], abs=1e-4)
    assert sum(float(row[3]) for row in table[2:]) == pytest.approx(1, abs=1e-3)
    assert main(["evaluate", "--workdir", str(workdir), "--report", str(report)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_checkpoint_without_running_averages_is_refused(run, tmp_path):
    workdir, _ = run
    stored = workdir / "checkpoints" / "4"
    arrays = {n: x for n, x in checkpoint.read_params(stored).items() if not n.endswith((".mean", ".var"))}
    checkpoint.write(tmp_path / "without", arrays, checkpoint.read_metadata(stored))
    with pytest.raises(UserError, match=r"has no parameter 'auxiliary_head\.convs\.0\.bn\.mean'"):
        weights.load_task(tmp_path / "without")


def test_predict_draws_images_of_any_size(run, tmp_path, capsys):
    workdir, _ = run
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for name, size in (("a.png", (70, 50)), ("b.jpg", (31, 90)), ("more/a.png", (9, 200))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    out = tmp_path / "out"
    files = [str(tmp_path / name) for name in ("a.png", "b.jpg", "more/a.png")]
    assert main(["predict", "--checkpoint", str(workdir), "--out", str(out), "--json", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == files
    names = ("a", "b", "a-2")
    assert {path.name for path in out.iterdir()} == {
        f"{n}.{kind}.png" for n in names for kind in ("overlay", "map")
    }
    class_names = weights.load_task(workdir)[1].class_names
    for line, name, file in zip(lines, names, files, strict=True):
        numbers = Image.open(out / f"{name}.map.png")
        assert numbers.mode == "P" and numbers.size == Image.open(file).size
        shares = (
            np.bincount(np.asarray(numbers).ravel(), minlength=len(class_names)) / np.asarray(numbers).size
        )
        expected = {class_names[c]: shares[c] for c in np.flatnonzero(shares)}
        assert line["shares"] == pytest.approx(expected)
        assert list(line["shares"].values()) == sorted(line["shares"].values(), reverse=True)
        assert Image.open(out / f"{name}.overlay.png").size == numbers.size


def test_predict_refuses_what_segmentation_does_not_give(run, tmp_path, capsys):
    workdir, _ = run
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    arguments = ["predict", "--checkpoint", str(workdir), str(tmp_path / "a.png")]
    assert main([*arguments, "--features", str(tmp_path / "f.npy")]) == 2
    assert "task 'segment' has no feature vectors" in capsys.readouterr().err
    assert not (tmp_path / "f.npy").exists()
    (tmp_path / "taken").mkdir()
    assert main([*arguments, "--out", str(tmp_path / "taken")]) == 2
    assert "exists already; nothing was overwritten" in capsys.readouterr().err


def test_data_draws_maps_over_images(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    overrides = [f"--config.{each}" for each in SMALL]
    command = ["data", "--config", "segment:digits", "--out", str(sheet), "--rows", "1", "--seconds", "0"]
    assert main([*command, *overrides]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["classes"] == 11 and sheet.exists()


def test_the_shapes_of_a_batch_are_known_without_reading_one():
    task = make_task(config())
    batch = next(task.data.train_batches(0))
    shapes = {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in task.batch_shapes().items()}
