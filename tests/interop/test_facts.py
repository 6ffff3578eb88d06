"""The JSON of transformers and timm, written and read."""

import dataclasses
import json

import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.interop import facts
from cnx2_jax.interop.facts import Facts

SAID = Facts(("cat", "dog", "newt"), (192, 192), 0.9, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 40), "in_chans": 3, "patch_size": 4}


def known(said):
    """What `read` finds of facts: the dtype is stated for arrays alone."""
    found = dataclasses.asdict(said)
    del found["dtype"], found["bands"]
    return found


def put(folder, **documents):
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


def test_timm_there_and_back(tmp_path):
    put(tmp_path, config=facts.timm_config(SAID, "custom", **SIZES))
    assert facts.read(tmp_path) == {k: v for k, v in known(SAID).items() if v}


def test_a_detector_there_and_back(tmp_path):
    said = dataclasses.replace(SAID, eval_sides=(1333, 800), image_size=(1024, 512))
    put(
        tmp_path,
        config=facts.detector_config(said),
        preprocessor_config=facts.detector_preprocessor(said),
    )
    expected = {**known(said)}
    del expected["eval_crop"]  # whole images are evaluated
    assert facts.read(tmp_path) == expected


def test_hugging_face_there_and_back(tmp_path):
    put(
        tmp_path,
        config=facts.huggingface_config(SAID, **SIZES),
        preprocessor_config=facts.huggingface_preprocessor(SAID),
    )
    assert facts.read(tmp_path) == {k: v for k, v in known(SAID).items() if v}


ARRAYS = dataclasses.replace(
    SAID, mean=(900.0, 70.5, 0.0), std=(12.0, 3.0, 1.5), dtype="uint16", bands=("B04", "B03", "B02")
)


@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_arrays_have_the_statistics_of_their_bands_in_their_own_unit(library, tmp_path):
    assert facts.huggingface_preprocessor(ARRAYS) is None  # it divides pixels by 255
    make = {"huggingface": facts.huggingface_config, "timm": facts.timm_config}[library]
    document = make(ARRAYS, **({"variant": "custom"} if library == "timm" else {}), **SIZES)
    stated = document[facts.ARRAYS]
    assert (stated["mean"], stated["std"]) == ([900.0, 70.5, 0.0], [12.0, 3.0, 1.5])
    put(tmp_path, config=document)
    assert facts.read(tmp_path) == {k: v for k, v in dataclasses.asdict(ARRAYS).items() if v}


def test_oblong_images(tmp_path):
    """transformers has no preprocessing to an oblong size, but config.json holds the size."""
    oblong = dataclasses.replace(SAID, image_size=(160, 224))
    assert facts.huggingface_preprocessor(oblong) is None
    put(tmp_path, config=facts.huggingface_config(oblong, **SIZES))
    assert facts.read(tmp_path) == {"class_names": SAID.class_names, "image_size": (160, 224)}


def test_timm_warps_large_images():
    large = dataclasses.replace(SAID, image_size=(384, 384))
    prepared = facts.timm_config(large, "tiny", **SIZES)["pretrained_cfg"]
    assert (prepared["crop_mode"], prepared["crop_pct"]) == ("squash", 1.0)
    prepared = facts.timm_config(SAID, "tiny", **SIZES)["pretrained_cfg"]
    assert (prepared["crop_mode"], prepared["crop_pct"]) == ("center", 0.9)


def test_timm_has_no_stem_of_two():
    with pytest.raises(UserError, match="patch_size 2"):
        facts.timm_config(SAID, "custom", **{**SIZES, "patch_size": 2})


def test_numbered_classes_have_no_names(tmp_path):
    put(tmp_path, config={"model_type": "convnextv2", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    assert facts.read(tmp_path) == {}


def test_files_of_other_models_say_nothing(tmp_path):
    assert facts.read(tmp_path) == {}
    put(tmp_path, config={"model_type": "vit", "image_size": 512, "id2label": {"0": "cat"}})
    assert facts.read(tmp_path) == {}
    put(tmp_path, config={"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 512, 512]}})
    assert facts.read(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "convnextv2", "id2label": {"1": "a"}}'])
def test_damaged(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as raised:
        facts.read(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
