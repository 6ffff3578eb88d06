"""Scenes of digits: pure functions of (split, index), exact masks, no digit in both splits."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.data.encoded_masks import decode_mask
from cnx2_jax.data.sources import scenes
from cnx2_jax.data.sources.digits import split_digits
from cnx2_jax.data.sources.scenes import SIDE, make_scene, open_scenes, paint
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError


def decoded(source, index):
    record = source.read(tf.constant(index, tf.int64))
    return [np.asarray(Image.open(io.BytesIO(record[name].numpy()))) for name in ("image", "map")]


@pytest.fixture(scope="module")
def drawn():
    digits = split_digits("train")
    return [make_scene(digits, "train", index) for index in range(60)]


def test_records_are_functions_of_split_and_index(drawn):
    source = open_scenes("3", "train")
    assert source.num_records == 3 and source.class_names == ("background", *"0123456789")
    for index in (2, 0):
        image, classes = decoded(source, index)
        np.testing.assert_array_equal(image, drawn[index].image)
        np.testing.assert_array_equal(classes, paint(drawn[index]))
        assert image.shape == (SIDE, SIDE, 3) and classes.shape == (SIDE, SIDE)
    assert not np.array_equal(drawn[0].image, drawn[1].image)
    assert not np.array_equal(decoded(open_scenes("1", "val"), 0)[0], drawn[0].image)
    assert source.describe(2) == "scenes/train/2"
    for name in ("image", "map"):
        stored = source.read(tf.constant(1, tf.int64))[name]
        assert source.fields[name].decode(stored).shape[:2] == (SIDE, SIDE)


def test_objects_are_the_digits_that_can_be_seen(drawn):
    source = open_scenes("60", "train")
    kept = source.annotations
    np.testing.assert_array_equal(kept.image_ids, range(60))
    assert kept.class_names == tuple("0123456789") and not kept.crowds.any()
    covered = 0
    for index, scene in enumerate(drawn):
        rows = slice(kept.starts[index], kept.starts[index + 1])
        masks = [decode_mask(mask, (SIDE, SIDE)).astype(bool) for mask in kept.masks[rows]]
        painted = np.zeros((SIDE, SIDE), np.uint8)
        for mask, digit in zip(masks, kept.classes[rows], strict=True):
            assert not painted[mask].any()
            painted[mask] = digit + 1
        np.testing.assert_array_equal(painted, paint(scene))
        covered += sum(instance.mask.sum() for instance in scene.instances) - sum(map(np.sum, masks))
        np.testing.assert_array_equal(kept.areas[rows], [mask.sum() for mask in masks])
        stored = source.read(tf.constant(index, tf.int64))["instances"]
        np.testing.assert_array_equal(stored["classes"], kept.classes[rows])
        for mask, (y0, x0, y1, x1) in zip(masks, stored["boxes"].numpy().astype(int), strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
    assert covered > 0


def test_splits_have_no_digit_in_common():
    train, val = split_digits("train"), split_digits("val")
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    for split in (train, val):
        np.testing.assert_array_equal(split.ink, load_digits().images[split.indices])
        np.testing.assert_array_equal(split.labels, load_digits().target[split.indices])


def test_scenes_are_drawn_with_the_digits_of_their_split(monkeypatch):
    asked = []
    digits = split_digits("val")
    monkeypatch.setattr(scenes, "split_digits", lambda split: asked.append(split) or digits)
    open_scenes("1", "val")
    assert asked == ["val"]


def test_later_digits_cover_earlier_ones(drawn):
    covered = 0
    for scene in drawn:
        classes = paint(scene)
        union = np.zeros_like(classes, bool)
        for instance in reversed(scene.instances):
            assert instance.mask.shape == (SIDE, SIDE) and instance.mask.sum() > 20
            assert (classes[instance.mask & ~union] == instance.digit + 1).all()
            covered += (instance.mask & union).sum()
            union |= instance.mask
        np.testing.assert_array_equal(classes > 0, union)
    assert covered > 0


def test_scenes_hold_every_class_and_two_digits_or_more(drawn):
    counts = np.bincount(np.concatenate([paint(scene).reshape(-1) for scene in drawn]), minlength=11)
    assert (counts > 300).all() and 0.7 < counts[0] / counts.sum() < 0.95
    assert {len(scene.instances) for scene in drawn} <= {1, 2, 3, 4}


def test_digits_differ_from_the_ground_beside_them(drawn):
    """No threshold of brightness separates them, but each stands out."""
    for scene in drawn[:20]:
        ground = scene.image[paint(scene) == 0].mean(axis=0)
        for instance in scene.instances:
            seen = instance.mask & (paint(scene) == instance.digit + 1)
            assert np.abs(scene.image[seen].mean(axis=0) - ground).max() > 30


@pytest.mark.parametrize("records", ["0", "x", "100001", "-1", "1e3"])
def test_user_errors(records):
    with pytest.raises(UserError, match=rf"'scenes:{records}' must be scenes or scenes:RECORDS, from 1"):
        open_scenes(records, "train")
