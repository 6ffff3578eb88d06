"""Detection as a task: what the model is given, starting weights, a run from end to end."""

import json
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from pycocotools import mask as coco_mask

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import UserError
from cnx2_jax.evaluation.coco import AveragePrecision
from cnx2_jax.models.mask_rcnn import Detections, MaskRCNN
from cnx2_jax.models.state import split
from cnx2_jax.observe import flops
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.tasks import make_task, models
from cnx2_jax.tasks.base import Described
from cnx2_jax.train import sharding
from cnx2_jax.train.program import make_program
from cnx2_jax.train.terms import value

ENCODER = ["model.depths=(1,1,1,1)", "model.dims=(4,4,8,8)", "image_size=(64,64)"]
SMALL = [
    *ENCODER,
    "model.channels=16",
    "model.fc_channels=16",
    "model.train_candidates=30",
    "model.train_proposals=20",
    "model.candidates=30",
    "model.proposals=20",
    "model.rpn_samples=16",
    "model.roi_samples=8",
    "model.detections=10",
    "batch_size=4",
    "total_steps=2",
    "log_steps=1",
    "optimizer.warmup_steps=1",
    "data.source=scenes:6",
]
CLASSES = ("cat", "dog", "cow")
LOSSES = {"rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss", "mask_loss"}


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Nothing here runs long."""


def config(*overrides):
    return load_config("detect:digits", [f"--config.{each}" for each in [*SMALL, *overrides]])


def described(*overrides, classes=CLASSES):
    return make_task(config(*overrides), data=Described(class_names=classes))


def shapes_of(make):
    return split(nnx.eval_shape(make))[1]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (2, 32, 48, 3), np.uint8),
        "image_size": np.array([[32, 40], [20, 48]], np.int32),
        "boxes": rng.uniform(0, 32, (2, 5, 4)).astype(np.float32),
        "classes": rng.integers(0, 3, (2, 5)).astype(np.int32),
        "masks": rng.integers(0, 2, (2, 5, 6, 6), np.uint8),
        "instances_valid": rng.random((2, 5)) < 0.5,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def assert_normalised(images, batch):
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    rows = (np.asarray(array) for array in (images, batch["image"], batch["image_size"]))
    for image, stored, (height, width) in zip(*rows, strict=True):
        expected = (stored[:height, :width] / 255 - mean) / std
        np.testing.assert_allclose(image[:height, :width], expected, atol=1e-5)
        assert not image[height:].any() and not image[:, width:].any()


def test_the_model_is_given_normalised_images_and_their_objects(batch):
    model, keys = Mock(spec=MaskRCNN), jax.random.split(jax.random.key(0), 2)
    model.losses.return_value = {name: (jnp.float32(6), jnp.float32(len(name))) for name in LOSSES}
    terms, metrics = described().loss(model, batch, keys)
    images, sizes, truth, given_keys = model.losses.call_args.args
    assert_normalised(images, batch)
    assert given_keys is keys and sizes is batch["image_size"]
    assert truth.boxes is batch["boxes"] and truth.classes is batch["classes"]
    assert truth.valid is batch["instances_valid"] and truth.masks is batch["masks"]
    found = {name: float(value(term)) for name, term in terms.items()}
    assert found == pytest.approx({name: 6 / len(name) for name in LOSSES}) and metrics == {}


def test_scores_are_what_average_precision_takes(batch):
    model = Mock(spec=MaskRCNN)
    model.detect.return_value = Detections(*(jnp.full((2, 3), place) for place in range(5)))
    scores = described().score(model, batch, jnp.arange(2))
    assert set(scores) == set(AveragePrecision.names)
    for name, array in scores.items():
        assert array is getattr(model.detect.return_value, name)
    assert_normalised(model.detect.call_args.args[0], batch)


# Starting weights.


@pytest.mark.parametrize("kind", ["classify", "pretrain", "segment", "detect"])
def test_starting_weights(kind, tmp_path):
    """The encoder of any checkpoint; from another detector all but what is per class."""
    task = described(f"init_from={tmp_path / 'stored'}")
    recipe = {"classify": "finetune:digits", "pretrain": "pretrain:scenes", "segment": "segment:digits"}
    theirs = load_config(recipe.get(kind, "detect:digits"))
    for key in ("depths", "dims", "patch_size", "in_chans"):
        theirs.model[key] = task.config.model[key]
    others = Described(class_names=("one", "two"))
    if kind == "detect":
        shapes = shapes_of(lambda: described(classes=("one", "two")).init(nnx.Rngs(5)))
    elif kind == "segment":
        shapes = shapes_of(lambda: make_task(theirs, data=others).init(nnx.Rngs(5)))
    else:
        shapes = shapes_of(lambda: models.build(theirs, 7, nnx.Rngs(5)))
    rng = np.random.default_rng(0)
    stored = {name: rng.standard_normal(leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()}
    checkpoint.write(tmp_path / "stored", stored, make_metadata(theirs, ("one", "two")))
    like = shapes_of(lambda: task.init(nnx.Rngs(0)))
    fresh = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    started = task.start(fresh)
    assert started.keys() == fresh.keys()
    prefix = {"classify": "", "pretrain": "encoder."}.get(kind, "backbone.")
    per_class = (".fc_cls.", ".fc_reg.", ".conv_logits.")
    for name, array in started.items():
        part = name.removeprefix("backbone.")
        encoder = part.startswith(("downsample_layers.", "stages."))
        if encoder or (kind == "detect" and not any(layer in name for layer in per_class)):
            expected = stored[prefix + part if encoder else name]
        else:
            expected = fresh[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_a_segmenter_starts_from_a_detector(tmp_path):
    """Both hold the encoder under one prefix."""
    detector = described()
    shapes = shapes_of(lambda: detector.init(nnx.Rngs(0)))
    stored = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    checkpoint.write(tmp_path / "stored", stored, make_metadata(detector.config, CLASSES))
    overrides = [*ENCODER, f"init_from={tmp_path / 'stored'}"]
    segment = load_config("segment:digits", [f"--config.{each}" for each in overrides])
    segmenter = make_task(segment, data=Described(class_names=CLASSES))
    like = shapes_of(lambda: segmenter.init(nnx.Rngs(0)))
    fresh = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    for name, array in segmenter.start(fresh).items():
        assert np.all(array == name.startswith(("backbone.downsample_layers.", "backbone.stages."))), name


# Errors.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.rpn_samples=1"], "model.rpn_samples 1 must be at least 2"),
        (["model.roi_samples=3"], "model.roi_samples 3 must be at least 4"),
        (["model.detections=0"], "model.detections 0 must be at least 1"),
        (["data.max_instances=0"], "data.max_instances 0 must be at least 1"),
        (["image_size=(60,64)"], "image size 60x64 is not a multiple of the stride 16"),
        (["data.ratio_range=(2.0,1.0)"], r"data.ratio_range \(2.0, 1.0\) must be two positive numbers"),
        (["data.source=digits"], "data.source 'digits' has no objects"),
    ],
)
def test_settings_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        make_task(config(*overrides)).data  # noqa: B018 - opens it


def test_a_validation_set_without_objects_is_refused(tmp_path):
    for split_name, crowd in (("train", 0), ("val", 1)):
        (tmp_path / split_name).mkdir()
        Image.new("RGB", (60, 50)).save(tmp_path / split_name / "1.png")
        annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [4, 4, 30, 40], "area": 1200}
        annotation |= {"iscrowd": crowd, "segmentation": [[4, 4, 34, 4, 34, 44, 4, 44]]}
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": 50, "width": 60}],
            "categories": [{"id": 3, "name": "cat"}],
            "annotations": [annotation],
        }
        (tmp_path / f"{split_name}.json").write_text(json.dumps(content))
    places = [f"data.{name}_annotations={name}.json" for name in ("train", "val")]
    places += [f"data.{name}_images={name}" for name in ("train", "val")]
    task = make_task(config("data.source=coco", f"data.root={tmp_path}", *places))
    with pytest.raises(UserError, match=r"none of the 1 validation images has an object"):
        task.data  # noqa: B018 - opens it


# A run.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("detect") / "run"
    overrides = [f"--config.{each}" for each in SMALL]
    assert main(["train", "--config", "detect:digits", "--workdir", str(workdir), *overrides]) == 0
    return workdir


@pytest.mark.slow
def test_what_a_run_leaves(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert set(rows[0]) >= LOSSES
    assert all(np.isfinite(number) for row in rows for name, number in row.items() if name != "split")
    last = rows[-1]
    assert last["split"] == "val" and 0 <= last["box_ap"] <= 1 and 0 <= last["mask_ap50"] <= 1
    assert "box_ap_large" not in last  # no digit is large
    picture = np.asarray(Image.open(run / "detections" / "00000002.png"))
    assert picture.shape[2] == 3 and picture.std() > 10


@pytest.mark.slow
def test_evaluate_gives_the_same_and_writes_every_class_and_all_results(run, tmp_path, capsys):
    report, out = tmp_path / "report", tmp_path / "out"
    command = ["evaluate", "--workdir", str(run), "--report", str(report), "--out", str(out)]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = read_metrics(run / "metrics.jsonl")[-1]
    expected = {name: number for name, number in last.items() if name not in ("step", "split")}
    del found["checkpoint"]
    assert found == pytest.approx(expected, abs=1e-6)

    lines = (report / "classes.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0] == ["class", "box_ap", "mask_ap"] and [row[0] for row in table[2:]] == [*"0123456789"]
    aps = [float(row[1]) for row in table[2:] if row[1]]
    assert np.mean(aps) == pytest.approx(found["box_ap"], abs=1e-4)

    boxes, masks = (json.loads((out / f"results_{kind}.json").read_text()) for kind in ("bbox", "segm"))
    assert len(boxes) == len(masks) > 0
    assert {each["image_id"] for each in boxes} <= set(range(6))
    assert {each["category_id"] for each in masks} <= set(range(10))
    assert all(each["segmentation"]["size"] == [64, 64] for each in masks)
    assert main(["evaluate", "--workdir", str(run), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--knn", "3"], "--knn: task 'detect' gives no label to an image; leave it out"),
        (["--set", "imagenet-v2=FOLDER"], "is of task 'detect', and --set needs a classifier"),
    ],
)
def test_evaluations_of_classifiers_are_refused(options, message, run, capsys):
    assert main(["evaluate", "--workdir", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_predict_draws_images_of_any_size(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    sizes = {"a.png": (70, 50), "b.jpg": (31, 90)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / name)
    files, out = [str(tmp_path / name) for name in sizes], tmp_path / "out"
    assert main(["predict", "--checkpoint", str(run), "--out", str(out), "--json", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == files
    assert {path.name for path in out.iterdir()} == {"a.objects.png", "b.objects.png"}
    assert sum(len(line["objects"]) for line in lines) > 0
    for line, (height, width) in zip(lines, sizes.values(), strict=True):
        assert Image.open(out / f"{line['image'][-5]}.objects.png").size == (width, height)
        scores = [found["score"] for found in line["objects"]]
        assert scores == sorted(scores, reverse=True) and all(0 < score <= 1 for score in scores)
        for found in line["objects"]:
            assert found["name"] == str(found["class"])
            x, y, across, down = found["bbox"]
            assert 0 <= x <= x + across <= width + 1e-3 and 0 <= y <= y + down <= height + 1e-3
            pixels = coco_mask.decode(found["segmentation"])
            assert pixels.shape == (height, width)
            rows, columns = np.nonzero(pixels)
            assert np.all((rows + 1 > y) & (rows < y + down) & (columns + 1 > x) & (columns < x + across))


def test_lines_and_pictures_show_what_is_likely():
    task = described()
    mask = np.zeros((8, 10), np.uint8, order="F")
    mask[2:6, 3:9] = 1
    counts = coco_mask.encode(mask)["counts"]
    outputs = {
        "image": np.zeros((8, 10, 3), np.uint8),
        "boxes": np.array([[2, 3, 6, 9], [0, 0, 4, 4]], np.float32),
        "scores": np.array([0.75, 0.25], np.float32),
        "classes": np.array([1, 2], np.int32),
        "masks": np.array([counts, counts], object),
    }
    prediction = task.prediction(outputs, 5)
    assert [found["name"] for found in prediction["objects"]] == ["dog", "cow"]
    assert prediction["objects"][0]["bbox"] == [3, 2, 6, 4]
    assert task.prediction_lines(prediction) == ["  dog  75.00%  x 3, y 2, 6 x 4 pixels"]
    assert task.prediction_lines({"objects": []}) == ["  nothing with a score of 0.3 or more"]
    drawn = np.asarray(task.prediction_pictures(outputs)["objects"])
    assert drawn[4, 5].any() and not drawn[7, 0].any()


@pytest.mark.slow
def test_data_draws_objects_over_images(tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    overrides = [f"--config.{each}" for each in SMALL]
    command = ["data", "--config", "detect:digits", "--out", str(sheet), "--rows", "1", "--seconds", "0"]
    assert main([*command, *overrides]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["classes"] == 10 and sheet.exists()


def test_a_step_is_traced_from_shapes_alone():
    """As `cnx2 preflight` begins, for a platform that is not here."""
    task = make_task(config(), "tpu", Described(6, class_names=CLASSES))
    program = make_program(task, sharding.make_mesh(task.config.mesh))
    traced = program.step.trace(program.like, task.batch_shapes())
    per_image = flops.matrix_flops(traced.jaxpr) / task.config.batch_size
    assert per_image > 2 * 3 * 49 * 16 * 16 * 8  # the box head's first layer, forward and backward, 8 regions


def test_the_shapes_of_a_batch_are_known_without_reading_one():
    task = make_task(config())
    batch = next(task.data.train_batches(0))
    shapes = {name: (x.shape, x.dtype) for name, x in batch.items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in task.batch_shapes().items()}
