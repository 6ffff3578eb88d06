"""Regression as a task: standardised targets, losses, original units everywhere, a run from end to end."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.interop import stablehlo
from cnx2_jax.models.state import split
from cnx2_jax.tasks import make_task, weights
from cnx2_jax.tasks.base import Described
from cnx2_jax.train.terms import value

SMALL = [
    "model.depths=(1,1,1,1)",
    "model.dims=(4,4,8,8)",
    "image_size=(8,24)",
    "batch_size=8",
    "total_steps=4",
    "log_steps=1",
    "checkpoint_steps=3",
    "optimizer.warmup_epochs=0",
]


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


class Given(nnx.Module):
    """Any module that maps images to numbers will do: this one has its numbers in a parameter."""

    def __init__(self, numbers):
        self.numbers = nnx.Param(jnp.float32(numbers))

    def __call__(self, images, keys=None):
        return self.numbers[...]


def config(*overrides):
    return load_config("regress:digits", [f"--config.{each}" for each in [*SMALL, *overrides]])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of different brightness; `bright` is large, `dark` is a little off -bright / 100."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = ["image,bright,dark,same,split"]
    for index in range(24):
        Image.fromarray(np.full((8, 24), 10 * index, np.uint8)).save(folder / f"{index:02}.png")
        noise = rng.standard_normal()
        lines.append(
            f"{index:02}.png,{1000 + 10 * index},{noise - index / 10},7,{'val' if index % 3 else 'train'}"
        )
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def keys(images, targets='("bright","dark")'):
    place = [f"data.root={images}", f"data.labels={images / 'labels.csv'}"]
    return ["data.source=folder", *place, f"data.targets={targets}"]


@pytest.mark.parametrize("kind", ["squared", "huber"])
def test_losses_and_metrics_against_numpy(images, kind):
    task = make_task(config(*keys(images), f"regression_loss={kind}", "huber_delta=0.5"))
    rows = np.genfromtxt(images / "labels.csv", delimiter=",", skip_header=1, usecols=(1, 2))
    train = rows[np.arange(24) % 3 == 0]
    np.testing.assert_allclose(task.standards.mean, train.mean(axis=0))
    np.testing.assert_allclose(task.standards.deviation, train.std(axis=0))
    numbers = np.random.default_rng(0).standard_normal((16, 2))
    target = rows[np.arange(24) % 3 > 0]
    errors = numbers - (target - train.mean(axis=0)) / train.std(axis=0)
    squared = kind == "squared"
    huber = np.where(np.abs(errors) <= 0.5, errors**2 / 2, 0.5 * (np.abs(errors) - 0.25))
    expected = errors**2 if squared else huber
    batch = {"image": np.zeros((16, 8, 24, 1), np.uint8), "value": np.float32(target)}
    loss, _ = task.loss(Given(numbers), batch, jax.random.split(jax.random.key(0), 16))
    assert float(value(loss["loss"])) == pytest.approx(expected.mean(), rel=1e-4)
    found = task.evaluate(Given(numbers), [{**batch, "mask": np.ones(16, bool)}])
    predicted = numbers * train.std(axis=0) + train.mean(axis=0)
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert found["mae_bright"] == pytest.approx(np.abs(predicted - target)[:, 0].mean(), rel=1e-5)
    rmse = np.sqrt(((predicted - target) ** 2).mean(axis=0))
    assert found["rmse"] == pytest.approx(rmse.mean(), rel=1e-5)
    assert found["rmse_dark"] == pytest.approx(rmse[1], rel=1e-5)


def test_mistakes(images):
    with pytest.raises(UserError, match="target 'same' is the same for all training images"):
        make_task(config(*keys(images, '("dark","same")')))
    with pytest.raises(UserError, match="has no column 'darc'; did you mean 'dark'"):
        make_task(config(*keys(images, "darc")))
    with pytest.raises(UserError, match="unknown regression_loss 'hubre'; did you mean 'huber'"):
        make_task(config("regression_loss=hubre"), data=Described(class_names=("x",)))
    with pytest.raises(UserError, match="the checkpoint is of task 'classify', not of regression"):
        task = make_task(config(), data=Described(class_names=("x",)))
        task.adopt({"config": {"task": "classify"}})


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = [f"--config.{each}" for each in [*SMALL, *keys(images)]]
    assert main(["train", "--config", "regress:digits", "--workdir", str(folder), *settings]) == 0
    return folder


def values_of(run, images):
    """Predictions in original units, by the parts."""
    model, task = weights.load_task(run)
    pixels = np.stack([np.asarray(Image.open(image)) for image in images])[..., None]
    standards = checkpoint.read_metadata(checkpoint.find(run))["standards"]
    numbers = np.asarray(jax.jit(lambda x: model(x))(task.normalise(pixels)))
    return numbers * standards["deviation"] + standards["mean"]


def test_predictions_and_exports_have_the_targets_units(run, images, tmp_path, capfd):
    image = images / "07.png"
    expected = values_of(run, [image])[0]
    assert 900 < expected[0] < 1400
    assert main(["predict", "--checkpoint", str(run), "--json", str(image)]) == 0
    found = json.loads(capfd.readouterr().out)["values"]
    np.testing.assert_allclose([found["bright"], found["dark"]], expected, rtol=1e-4)
    assert main(["predict", "--checkpoint", str(run), str(image)]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("  bright  1")

    out = tmp_path / "model.stablehlo"
    command = [
        "export",
        "--checkpoint",
        str(run),
        "--format",
        "stablehlo",
        "--input",
        "uint8",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    exported = stablehlo.run(out, np.asarray(Image.open(image))[None, :, :, None])
    np.testing.assert_allclose(exported[0], expected, rtol=1e-4)


def test_an_orbax_export_predicts_alike(run, images, tmp_path, capfd):
    out, some = tmp_path / "exported", [images / "07.png", images / "20.png"]
    assert main(["export", "--checkpoint", str(run), "--format", "orbax", "--out", str(out)]) == 0
    np.testing.assert_allclose(values_of(out, some), values_of(run, some), rtol=1e-6)


def test_evaluation_uses_the_checkpoints_standards(run, images, tmp_path, capfd):
    other = tmp_path / "images"
    other.mkdir()
    lines = (images / "labels.csv").read_text().splitlines()
    for index in range(24):
        (other / f"{index:02}.png").symlink_to(images / f"{index:02}.png")
    swapped = [
        line.replace("train", "TRAIN").replace("val", "train").replace("TRAIN", "val") for line in lines
    ]
    (other / "labels.csv").write_text("\n".join(swapped))
    place = [f"--config.data.root={other}", f"--config.data.labels={other / 'labels.csv'}"]
    report = tmp_path / "report"
    assert main(["evaluate", "--workdir", str(run), "--report", str(report), *place]) == 0
    assert (report / "targets.csv").read_text().splitlines()[0] == "target,mae,rmse,r2"
    found = json.loads(capfd.readouterr().out)
    val = np.arange(0, 24, 3)
    rows = np.genfromtxt(other / "labels.csv", delimiter=",", skip_header=1, usecols=(1, 2))[val]
    predicted = values_of(run, [images / f"{index:02}.png" for index in val])
    assert found["mae_bright"] == pytest.approx(np.abs(predicted - rows)[:, 0].mean(), rel=1e-4)
    assert found["rmse_dark"] == pytest.approx(np.sqrt(((predicted - rows)[:, 1] ** 2).mean()), rel=1e-4)


def test_a_head_of_the_same_targets_is_adapted(run, images):
    task = make_task(config(*keys(images), f"init_from={run}"))
    standards = task.standards
    task.standards = standards._replace(mean=tuple(m + 5 for m in standards.mean))
    fresh = split(task.init(nnx.Rngs(0)))[1]
    arrays, stored = task.start(fresh), checkpoint.read_params(checkpoint.find(run))
    np.testing.assert_allclose(arrays["head.kernel"], stored["head.kernel"], rtol=1e-5)
    expected = stored["head.bias"] - 5 / np.array(standards.deviation)
    np.testing.assert_allclose(arrays["head.bias"], expected, rtol=1e-4, atol=1e-6)
    other = make_task(config(*keys(images, '("bright",)'), f"init_from={run}"))
    fresh = split(other.init(nnx.Rngs(0)))[1]
    np.testing.assert_array_equal(other.start(fresh)["head.kernel"], fresh["head.kernel"])


def test_a_run_resumes_with_the_standards_that_it_began_with(run, images, tmp_path, capfd):
    workdir, table = tmp_path / "run", images / "labels.csv"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")  # as if it had been stopped after step 3
    (workdir / "result.json").unlink(missing_ok=True)
    text = table.read_text()
    try:
        table.write_text(text.replace(",10", ",90"))  # of 1000 and so on
        assert make_task(config(*keys(images))).standards.mean[0] > 2000
        settings = [f"--config.{each}" for each in [*SMALL, *keys(images)]]
        assert main(["train", "--config", "regress:digits", "--workdir", str(workdir), *settings]) == 0
    finally:
        table.write_text(text)
    assert "resuming after step 3" in capfd.readouterr().err
    before, after = (checkpoint.read_metadata(checkpoint.find(path)) for path in (run, workdir))
    assert after["standards"] == before["standards"]
