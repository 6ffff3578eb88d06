"""Folders of images and masks: which belong together, which are held out, and what is refused."""

import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.data.class_names import read_class_names
from cnx2_jax.data.segmentation_keys import add_segmentation_keys
from cnx2_jax.data.sources import open_set, open_source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError


def config(folder, source="masks", **changes):
    data = ConfigDict({"source": source, "root": str(folder), "val_fraction": 0.25, "train_per_class": 0})
    add_segmentation_keys(data)
    data.update(changes)
    return data


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("road\nbus stop \nsky\n\n\n", encoding="utf-8")
    return str(path)


def make(root, *stems, images="images", masks="masks", ending=".jpg", value=1, palette=False):
    mask = Image.new("P" if palette else "L", (6, 4), value)
    if palette:
        mask.putpalette(range(240))
    for stem in stems:
        for folder, content, kind in (
            (images, Image.new("RGB", (6, 4)), ending),
            (masks, mask, ".png"),
        ):
            path = root / folder / (stem + kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)


def described(source):
    return [source.describe(index) for index in range(source.num_records)]


def test_folders_of_splits(tmp_path, names):
    make(tmp_path, "training/b/x", "training/a")
    make(tmp_path, "training/c", ending=".PNG", palette=True)
    make(tmp_path, "validation/a", value=2)
    train, val = (open_source(config(tmp_path, classes=names), split, 0) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("road", "bus stop", "sky")
    images = ["a.jpg", "b/x.jpg", "c.PNG"]
    assert described(train) == [str(tmp_path / "images/training" / name) for name in images]
    assert described(val) == [str(tmp_path / "images/validation/a.jpg")]
    assert train.name_of(1, "map") == str(tmp_path / "masks/training/b/x.png")
    assert train.name_of(1, "image") == train.describe(1)
    for source, value in ((train, 1), (val, 2)):
        for index in range(source.num_records):
            record = source.read(tf.constant(index, tf.int64))
            assert Image.open(io.BytesIO(record["image"].numpy())).size == (6, 4)
            np.testing.assert_array_equal(source.fields["map"].decode(record["map"]), np.full((4, 6), value))


def test_a_share_is_held_out_by_name_where_there_is_no_val(tmp_path, names):
    make(tmp_path, *(f"train/{index:02}" for index in range(20)))
    data = config(tmp_path, classes=names)
    train, val = (open_source(data, split, 0) for split in ("train", "val"))
    assert val.num_records == 5 and train.num_records == 15
    assert not set(described(train)) & set(described(val))
    assert val.name_of(0, "map") == val.describe(0).replace("images", "masks").replace(".jpg", ".png")
    make(tmp_path / "other", *(f"train/{index:02}" for index in range(20)))
    other = open_source(config(tmp_path / "other", classes=names), "val", 7)
    assert [path.split("/")[-1] for path in described(other)] == [p.split("/")[-1] for p in described(val)]


def test_other_folders_and_ignored_values(tmp_path, names):
    make(tmp_path, "one", "two", images="JPEGImages", masks="SegmentationClass", palette=True, value=7)
    data = config(tmp_path, classes=names, images="JPEGImages", masks="SegmentationClass", ignore=7)
    source = open_source(data, "train", 0)
    stored = source.read(tf.constant(0, tf.int64))["map"]
    np.testing.assert_array_equal(source.fields["map"].decode(stored), np.full((4, 6), 7))


def test_ade20k_as_published(tmp_path, names):
    make(tmp_path, "training/ADE_train_1", masks="annotations", value=150)
    make(tmp_path, "validation/ADE_val_1", masks="annotations", value=0)
    train, val = (open_source(config(tmp_path, "ade20k"), split, 0) for split in ("train", "val"))
    assert len(train.class_names) == 150 == len(set(train.class_names))
    assert train.class_names[:8] == ("wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed")
    assert train.class_names[12] == "person" and train.class_names[-1] == "flag"
    for source, value in ((train, 149), (val, 255)):
        stored = source.read(tf.constant(0, tf.int64))["map"]
        np.testing.assert_array_equal(source.fields["map"].decode(stored), np.full((4, 6), value))
    renamed = open_source(config(tmp_path, "ade20k", classes=names), "val", 0)
    assert renamed.class_names == ("road", "bus stop", "sky")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read data.classes .*: No such file or directory; check the path"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"\n \n", "has no names; write one class name per line"),
        (b"a\n\nb\n", "line 2 of data.classes .* is blank"),
        (b"a\nb\na\n", "class 'a' is on lines 1 and 3 of data.classes .*; rename one"),
    ],
)
def test_class_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "names"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_class_names(str(path))


def break_masks(root):
    (root / "masks/train/b.png").unlink()


def break_stems(root):
    make(root, "train/b", ending=".png")


def break_folder(root):
    (root / "images").rename(root / "pictures")


def break_mask_folder(root):
    (root / "masks/train").rename(root / "masks/other")


def break_splits(root):
    for folder in ("images", "masks"):
        (root / folder / "train").rename(root / folder / "val")


def break_images(root):
    for name in "ab":
        (root / f"images/train/{name}.jpg").unlink()


@pytest.mark.parametrize(
    ("breaks", "changes", "message"),
    [
        (break_masks, {}, "image '.*/images/train/b.jpg' has no mask '.*/masks/train/b.png'; add it"),
        (break_stems, {}, r"images '.*/b\.jpg' and '.*/b\.png' share the mask 'train/b.png'"),
        (break_folder, {}, "'.*/images', the folder of images, is missing; check data.root and data.images"),
        (break_mask_folder, {}, "'.*/masks/train' does not exist; masks need the same sub-folders"),
        (break_splits, {}, "has a folder 'val' but no 'train'"),
        (break_images, {}, "no images .* in '.*/images/train'"),
        (None, {"classes": ""}, "data.classes is not set; pass --config.data.classes=FILE"),
        (None, {"val_fraction": 1.0}, r"data.val_fraction 1.0 is not in \[0, 1\)"),
        (None, {"ignore": 2}, "data.ignore 2 must be from 3"),
        (None, {"source": "masks:x"}, "unknown data.source 'masks:x'"),
        (None, {"root": "~/nowhere"}, "data.root '.*nowhere' is not a folder"),
    ],
)
def test_user_errors(tmp_path, names, breaks, changes, message):
    make(tmp_path, "train/a", "train/b")
    if breaks:
        breaks(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(config(tmp_path, **{"classes": names, **changes}), "train", 0)
    assert "\n" not in str(caught.value)


def test_other_tasks_take_no_maps(tmp_path):
    data = ConfigDict({"source": "masks", "root": str(tmp_path), "train_per_class": 0})
    with pytest.raises(UserError, match="'masks' has maps of classes, which this task does not train on"):
        open_source(data, "train", 0)
    with pytest.raises(UserError, match=r"unknown data\.val_source 'masks'.*known: folder, arrays, digits"):
        open_set("masks", str(tmp_path), ("a",), None)
