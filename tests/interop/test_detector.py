"""A Mask R-CNN in every export format and through the commands: objects, names and mistakes."""

import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.checkpoints.metadata import make_metadata
from cnx2_jax.cli import main
from cnx2_jax.configuration import image_hw, load_config
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.interop import export
from cnx2_jax.interop.differences import difference
from cnx2_jax.interop.export import FORMATS, Job
from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.interop.names import DetectorWidths, from_torch, to_torch
from cnx2_jax.models import EncoderConfig, MaskRCNN, UperNet
from cnx2_jax.models.state import split
from cnx2_jax.tasks import weights

NAMES = ("cat", "dog", "owl")
SIZE = (64, 96)
CONFIG = EncoderConfig((1, 1, 2, 1), (4, 6, 8, 10))
# No level has as many boxes as it may have candidates, and some proposals are left out.
OPTIONS = {"channels": 8, "fc_channels": 12, "candidates": 60, "proposals": 45, "detections": 9}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def model(build):
    return build(MaskRCNN, CONFIG, num_classes=len(NAMES), **OPTIONS)


@pytest.fixture(scope="module")
def inference(model):
    return InferenceModel(model, SIZE, mean=MEAN, std=STD, uint8=True)


@pytest.fixture(scope="module")
def expected(inference):
    """The results of three images."""
    return inference.reference(inference.some_images(3))


# Exports.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["savedmodel", "onnx"])
def test_other_frameworks_find_the_same_objects(name, inference, expected, tmp_path):
    pytest.importorskip(FORMATS[name].writer)
    pytest.importorskip(FORMATS[name].runtime)
    FORMATS[name].write(tmp_path / "out", Job(tmp_path, inference, None))
    found = FORMATS[name].run(tmp_path / "out", inference.some_images(3))
    outputs = {name: ((3, *output.shape), output.dtype) for name, output in inference.outputs.items()}
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == outputs
    most, _, objects, alike = difference(found, expected, 1e-4)
    assert objects == expected["count"].sum() == 3 * OPTIONS["detections"]
    assert alike == 1 and most < 1e-5


def test_the_results_are_worth_comparing(inference, expected):
    """Several classes, boxes of several levels, scores that were lowered and masks that are not flat."""
    sides = expected["boxes"][..., 2:] - expected["boxes"][..., :2]
    assert len(np.unique(expected["classes"])) > 1 and np.ptp(expected["scores"]) > 0.05
    assert sides.min() >= 0 and sides.max() > 56 and np.ptp(sides) > 30  # 56 pixels begin the second level
    assert expected["masks"].std() > 0.02  # 200 times the bound
    assert (np.diff(expected["scores"]) <= 0).all()


@pytest.mark.slow
def test_an_export_gives_what_predict_gives(stored, inference, tmp_path, capsys):
    """Boxes within 0.01 pixels and scores within 1e-4, of images of the size that evaluation takes."""
    images = inference.some_images(3)  # as in the check, so that one program serves both
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    out = tmp_path / "out"
    options = ["--input", "uint8", "--out", str(out)]
    assert main(["export", "--checkpoint", str(stored), "--format", "stablehlo", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "stablehlo" and result["alike"] == 1 and result["objects"] > 0
    found = FORMATS["stablehlo"].run(out, images)
    assert main(["predict", "--checkpoint", str(stored), "--json", *map(str, paths)]) == 0
    for row, line in enumerate(capsys.readouterr().out.splitlines()):
        objects = json.loads(line)["objects"]
        assert len(objects) == found["count"][row] > 0
        y0, x0, y1, x1 = found["boxes"][row, : len(objects)].T
        np.testing.assert_allclose(
            [each["bbox"] for each in objects], np.stack([x0, y0, x1 - x0, y1 - y0], axis=1), atol=0.01
        )
        np.testing.assert_allclose(
            [each["score"] for each in objects], found["scores"][row, : len(objects)], atol=1e-4
        )
        assert [each["class"] for each in objects] == list(found["classes"][row, : len(objects)])


def test_few_other_objects_are_rounding_and_many_are_an_error(inference, expected, tmp_path, monkeypatch):
    """Two of 27 objects may differ, and the order of objects does not matter."""
    monkeypatch.setattr(inference, "reference", lambda images: expected)

    def exported(change):
        found = {name: np.array(array[:, ::-1]) for name, array in expected.items() if name != "count"}
        found["count"] = np.array(expected["count"])
        change(found)
        form = export.Format("", lambda path, job: path.touch(), lambda *_: found, "jax", "jax")
        return export.export(tmp_path / "out", form, Job(tmp_path, inference, None))

    def move(count):
        def change(found):
            found["boxes"][0, :count] += 1

        return change

    result = exported(move(2))
    assert result["objects"] == 27 and result["alike"] == pytest.approx(25 / 27)
    (tmp_path / "out").unlink()
    for change in (
        move(3),
        lambda found: found["masks"].__imul__(0.99),
        lambda found: found["scores"].fill(np.nan),
        lambda found: found["classes"].__iadd__(1),
        lambda found: found["count"].fill(5),
    ):
        with pytest.raises(RunError, match=r"jax finds only .* of 27 objects like the network"):
            exported(change)
    assert not (tmp_path / "out").exists()
    nothing = {name: np.zeros_like(array) for name, array in expected.items()}
    assert difference(nothing, nothing, 1e-4) == (0, 1, 0, 1)


# Names.


@pytest.fixture(scope="module")
def arrays(model):
    return {name: np.asarray(value) for name, value in split(model)[1].items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("naming", ["mmdetection", "official"])
def test_there_and_back(arrays, naming, prefix):
    tensors = {prefix + name: value for name, value in to_torch(arrays, naming).items()}
    imported = from_torch(tensors, "a file")
    assert (imported.depths, imported.dims, imported.num_classes) == (CONFIG.depths, CONFIG.dims, 3)
    assert (imported.naming, imported.heads) == (naming, None)
    assert imported.detector == DetectorWidths(8, 12)
    assert imported.params.keys() == arrays.keys()
    for name, value in arrays.items():
        assert imported.params[name].tobytes() == value.tobytes(), name
        assert imported.params[name].shape == value.shape, name


def test_names_of_mmdetection(arrays):
    """Names and layouts, written out from mmdetection's and mmpretrain's modules."""
    tensors = to_torch(arrays, "mmdetection")
    heads = [f"roi_head.bbox_head.{name}" for name in ("shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg")]
    heads += [f"roi_head.mask_head.convs.{index}.conv" for index in range(4)]
    heads += [f"roi_head.mask_head.{name}" for name in ("upsample", "conv_logits")]
    heads += [f"rpn_head.{name}" for name in ("rpn_conv", "rpn_cls", "rpn_reg")]
    heads += [f"neck.{name}.{index}.conv" for name in ("lateral_convs", "fpn_convs") for index in range(4)]
    expected = {f"{name}.{leaf}" for name in heads for leaf in ("weight", "bias")}
    assert {name for name in tensors if not name.startswith("backbone.")} == expected
    block = "backbone.stages.2.1."
    shapes = {name.removeprefix(block): x.shape for name, x in tensors.items() if name.startswith(block)}
    assert shapes == {
        "depthwise_conv.weight": (8, 1, 7, 7),
        "depthwise_conv.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "pointwise_conv1.weight": (32, 8),
        "pointwise_conv1.bias": (32,),
        "grn.gamma": (32,),
        "grn.beta": (32,),
        "pointwise_conv2.weight": (8, 32),
        "pointwise_conv2.bias": (8,),
    }
    assert tensors["backbone.norm3.weight"].shape == (10,)
    kernel = arrays["roi_head.bbox_head.shared_fcs.0.kernel"]  # PyTorch flattens [channels, rows, columns]
    flat = tensors["roi_head.bbox_head.shared_fcs.0.weight"]
    assert flat.shape == (12, 8 * 49) and flat[5, 3 * 49 + 2 * 7 + 6] == kernel[2, 6, 3, 5]
    kernel = arrays["roi_head.mask_head.upsample.kernel"]
    assert tensors["roi_head.mask_head.upsample.weight"][3, 5, 0, 1] == kernel[0, 1, 3, 5]
    assert tensors["roi_head.bbox_head.fc_cls.weight"].shape == (4, 12)  # the background is last, as here
    assert tensors["roi_head.mask_head.conv_logits.weight"].shape == (3, 8, 1, 1)


def test_what_does_not_fit_is_refused(arrays, build):
    tensors = to_torch(arrays, "mmdetection")
    tensors["roi_head.mask_head.upsample.weight"] = np.zeros((8, 8, 3, 3), np.float32)
    del tensors["neck.fpn_convs.2.conv.bias"]
    with pytest.raises(UserError) as raised:
        from_torch(tensors, "weights.pth")
    assert "1 missing: 'neck.fpn_convs.2.conv.bias'" in str(raised.value)
    assert "'roi_head.mask_head.upsample.weight' [8, 8, 3, 3], not [8, 8, 2, 2]" in str(raised.value)
    for naming in ("timm", "huggingface"):
        with pytest.raises(UserError, match=f"{naming} has no Mask R-CNN of ConvNeXt V2"):
            to_torch(arrays, naming)
    segmenter = split(build(UperNet, CONFIG, num_classes=2, channels=4, auxiliary_channels=4))[1]
    with pytest.raises(UserError, match="naming mmdetection is for detectors"):
        to_torch(segmenter, "mmdetection")


# Commands.


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """The folder of a checkpoint of the network."""
    keys = [f"model.{name}={value}" for name, value in OPTIONS.items()]
    keys += ["model.depths=(1,1,2,1)", "model.dims=(4,6,8,10)", "model.patch_size=4", "image_size=(96,)"]
    config = load_config("detect:digits", [f"--config.{each}" for each in keys])
    config.data.mean, config.data.std = MEAN, STD
    config.data.eval_short, config.data.eval_long = 64, 96
    folder = tmp_path_factory.mktemp("detector") / "stored"
    checkpoint.write(folder, split(model)[1], make_metadata(config, NAMES))
    return folder


def test_weights_out_and_in_again(model, stored, tmp_path, capsys):
    """In mmdetection's names; every bit of the converted network is the same, and so are its facts."""
    out, converted = tmp_path / "out", tmp_path / "converted"
    command = ["export", "--checkpoint", str(stored), "--format", "safetensors"]
    assert main([*command, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["runtime"] is None and "read back bit for bit" in captured.err
    assert main(["convert", "--from", str(out / "model.safetensors"), "--to", str(converted)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["naming"], result["classes"]) == ("mmdetection", 3)
    loaded, task = weights.load_task(converted)
    assert task.class_names == NAMES and task.config.task == "detect"
    assert (task.config.model.channels, task.config.model.fc_channels) == (8, 12)
    assert image_hw(task.config) == (96, 96)
    assert (task.config.data.eval_long, task.config.data.eval_short) == (96, 64)
    assert tuple(task.config.data.mean) == MEAN and tuple(task.config.data.std) == STD
    ours, theirs = split(loaded)[1], split(model)[1]
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.asarray(ours[name]).tobytes() == np.asarray(array).tobytes(), name

    for naming in ("timm", "huggingface"):
        assert main([*command, "--out", str(tmp_path / "no"), "--naming", naming]) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "no").exists()


def test_a_file_of_mmdetection_alone(arrays, tmp_path, capsys):
    """The recipes' image size, and names for the classes that the file does not name."""
    safetensors.numpy.save_file(to_torch(arrays, "mmdetection"), tmp_path / "model.safetensors")
    command = ["convert", "--from", str(tmp_path / "model.safetensors"), "--to"]
    assert main([*command, str(tmp_path / "new")]) == 0
    _, task = weights.load_task(tmp_path / "new")
    assert task.class_names == ("class_0000", "class_0001", "class_0002")
    assert image_hw(task.config) == (1024, 1024) and task.config.data.eval_long == 1333


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format stablehlo --image-size 64 90", "image size 64x90 is not a multiple of the stride 32"),
        ("--format stablehlo --image-size 64 64 64", "--image-size takes a side, or height and width, not 3"),
        ("--format orbax --image-size 64", "--image-size is for --format stablehlo, savedmodel, onnx"),
    ],
)
def test_mistakes_are_one_line(options, message, stored, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(stored), "--out", str(out), *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()
