"""Folders in COCO's format: what is read from the file, what is trained on, and what is refused."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cnx2_jax.data.detection_keys import add_detection_keys
from cnx2_jax.data.encoded_masks import decode_mask, encode_mask, encode_runs, region_runs, to_rle
from cnx2_jax.data.sources import open_source
from cnx2_jax.errors import UserError

SIZES = {7: (40, 60), 3: (50, 30), 12: (20, 20)}  # height and width by the id of the image
SQUARE = [10.25, 5.5, 30.7, 5.5, 30.7, 20.1, 10.25, 20.1]
L_SHAPE = [[2, 2, 12, 2, 12, 6, 2, 6], [2, 6, 5, 6, 5, 25, 2, 25]]


def counts_of(rows, columns, size):
    """Uncompressed run lengths of a rectangle, [from, to) each."""
    mask = np.zeros(size, np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(edges, prepend=0, append=flat.size).tolist()


def compressed(rows, columns, size):
    mask = np.zeros(size, np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return coco_mask.encode(np.asfortranarray(mask))["counts"].decode()


def annotation(number, image, category, box, segmentation, crowd=0):
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
        "segmentation": segmentation, "iscrowd": crowd,
    }  # fmt: skip


def content():
    return {
        "images": [
            {"id": number, "height": height, "width": width, "file_name": f"{number}.jpg"}
            for number, (height, width) in SIZES.items()
        ],
        "categories": [{"id": 90, "name": "cow"}, {"id": 1, "name": "cat"}],
        "annotations": [
            annotation(31, 3, 1, [2, 2, 10, 23], L_SHAPE),
            annotation(
                5, 7, 90, [20, 10, 30, 12],
                {"size": [40, 60], "counts": counts_of((10, 22), (20, 50), (40, 60))},
            ),
            annotation(
                8, 3, 90, [4, 8, 6, 9],
                {"size": [50, 30], "counts": compressed((8, 17), (4, 10), (50, 30))},
            ),
            annotation(
                9, 7, 1, [0, 0, 9, 9], {"size": [40, 60], "counts": counts_of((0, 9), (0, 9), (40, 60))}, 1
            ),
            annotation(2, 7, 1, [10.25, 5.5, 20.45, 14.6], [SQUARE]),
            annotation(4, 7, 1, [10.25, 5.5, 0.5, 14.6], [SQUARE]),  # too narrow to train on
        ],
    }  # fmt: skip


def write(root, made, split="train", images=SIZES):
    (root / "annotations").mkdir(exist_ok=True)
    path = root / f"annotations/instances_{split}2017.json"
    path.write_text(json.dumps(made))
    (root / f"{split}2017").mkdir(exist_ok=True)
    for number in images:
        height, width = SIZES[number]
        Image.new("RGB", (width, height), (number, 0, 0)).save(root / f"{split}2017/{number}.jpg")
    return path


def keys(folder, **changes):
    data = ConfigDict({"source": "coco", "root": str(folder), "train_per_class": 0})
    add_detection_keys(data)
    data.update(changes)
    return data


def read(source, index):
    return source.read(tf.constant(index, tf.int64))


def test_records_hold_the_images_and_their_objects(tmp_path, capsys):
    path = write(tmp_path, content())
    source = open_source(keys(tmp_path), "train", 0)
    assert capsys.readouterr().err == ""
    assert source.num_records == 3 and source.class_names == ("cat", "cow")
    assert source.fields["instances"].most == 4
    assert source.describe(1) == str(tmp_path / "train2017/3.jpg")
    records = [read(source, index) for index in range(3)]
    assert [int(record["id"]) for record in records] == [7, 3, 12]
    objects = [record["instances"] for record in records]
    # Objects in the order of the file; neither the crowd nor the narrow one.
    assert [each["classes"].numpy().tolist() for each in objects] == [[1, 0], [0, 1], []]
    np.testing.assert_array_equal(
        objects[0]["boxes"], np.float32([[10, 20, 22, 50], [5.5, 10.25, 20.1, 30.7]])
    )
    for index, number in enumerate(SIZES):
        np.testing.assert_array_equal(objects[index]["size"], SIZES[number])
        image = source.fields["image"].decode(records[index]["image"])
        assert image.shape == (*SIZES[number], 3)
    assert objects[2]["boxes"].shape == (0, 4) and objects[2]["masks"].shape == (0,)

    # Masks, crowds included, are those of pycocotools.
    truth, kept = COCO(str(path)), source.annotations
    np.testing.assert_array_equal(kept.image_ids, list(SIZES))
    np.testing.assert_array_equal(kept.counts, [4, 2, 0])
    np.testing.assert_array_equal(kept.category_ids, [1, 90])
    row = 0
    for number in SIZES:
        for entry in truth.loadAnns(truth.getAnnIds(imgIds=[number])):
            np.testing.assert_array_equal(decode_mask(kept.masks[row], SIZES[number]), truth.annToMask(entry))
            np.testing.assert_array_equal(kept.boxes[row], entry["bbox"])
            assert kept.areas[row] == entry["area"] and kept.crowds[row] == entry["iscrowd"]
            row += 1
    assert row == 6
    some = kept.only(np.array([2, 1]))
    np.testing.assert_array_equal(some.image_ids, [12, 3])
    np.testing.assert_array_equal(some.boxes, kept.boxes[4:])
    np.testing.assert_array_equal(some.counts, [0, 2])


def test_other_names_and_subfolders(tmp_path):
    made = content()
    for image in made["images"]:
        image["file_name"] = f"a/{image['id']}.jpg"
    write(tmp_path, made)
    (tmp_path / "pictures").mkdir()
    os.rename(tmp_path / "train2017", tmp_path / "pictures/a")
    os.rename(tmp_path / "annotations/instances_train2017.json", tmp_path / "all.json")
    source = open_source(keys(tmp_path, val_annotations="all.json", val_images="pictures"), "val", 0)
    assert source.describe(0) == str(tmp_path / "pictures/a/7.jpg") and source.num_records == 3


def test_boxes_outside_of_their_image_are_clipped_and_counted(tmp_path, capsys):
    made = content()
    made["annotations"][0]["bbox"] = [-3, 30, 10, 23]
    made["annotations"][1]["bbox"] = [45, 10, 30, 12]
    write(tmp_path, made)
    source = open_source(keys(tmp_path), "train", 0)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "2 boxes of" in err and "reach out of their images" in err
    np.testing.assert_array_equal(read(source, 0)["instances"]["boxes"][0], [10, 45, 22, 60])
    np.testing.assert_array_equal(read(source, 1)["instances"]["boxes"][0], [30, 0, 50, 7])
    np.testing.assert_array_equal(source.annotations.boxes[0], [45, 10, 30, 12])


def change(part, place, **values):
    return lambda made: made[part][place].update(values)


def runs(counts, size=(40, 60)):
    return change("annotations", 1, segmentation={"size": list(size), "counts": counts})


REFUSED = [
    (change("images", 1, id=7), "has two of kind image with the id 7"),
    (change("images", 0, id="x"), "image number 0 of .* has the id 'x'; ids are whole numbers"),
    (change("images", 0, height=0), r"image 7 of .* has height and width \(0, 60\)"),
    (change("images", 0, file_name=None), "image 7 of .* has no file_name"),
    (
        change("images", 0, file_name="none.jpg"),
        "image '.*train2017/none.jpg' of id 7 in .* is missing; restore",
    ),
    (change("categories", 1, id=90), "has two of kind category with the id 90"),
    (change("categories", 1, name="cow"), "has two categories with the name 'cow'"),
    (change("annotations", 0, id=5), "has two of kind annotation with the id 5"),
    (change("annotations", 0, image_id=8), "annotation 31 of .* is of image 8, which the file does not list"),
    (
        change("annotations", 0, category_id=2),
        "annotation 31 of .* is of category 2, which the file does not",
    ),
    (change("annotations", 0, bbox=[1, 2, 3]), r"annotation 31 of .* has the bbox \[1, 2, 3\]"),
    (change("annotations", 0, area="big"), "annotation 31 of .* has the bbox .* and the area big"),
    (change("annotations", 0, segmentation=[]), "annotation 31 of .* has no polygon"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4]]), "annotation 31 of .* has a polygon of 4 numbers"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "has a polygon of 7 numbers"),
    (change("annotations", 0, segmentation=[["a"] * 6]), "has a polygon that is not a list of numbers"),
    (change("annotations", 0, segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "numbers that are not finite"),
    (
        change("annotations", 0, segmentation=None),
        "annotation 31 of .* has no segmentation: a list of polygons",
    ),
    (runs([100, 5]), r"annotation 5 of .* has run lengths of 105 pixels, not of 40 x 60"),
    (runs([2401, -1]), "has run lengths of 2400 pixels, not of"),
    (runs([0.5, 1]), "has run lengths that are not whole numbers"),
    (runs("PQ"), "has a string of run lengths that is damaged"),
    (runs(compressed((1, 2), (1, 2), (40, 61))), "has run lengths of 2440 pixels, not of 40 x 60"),
    (runs([2400], (60, 40)), r"has run lengths for \[60, 40\], but its image is \[40, 60\]"),
    (lambda made: made["annotations"].clear(), "has no annotations; give the file of a set with objects"),
    (lambda made: made.pop("categories"), "has no list 'categories'; give a file in COCO's format"),
]


def test_files_that_are_refused(tmp_path):
    write(tmp_path, content())
    for breaks, message in REFUSED:
        made = content()
        breaks(made)
        write(tmp_path, made, images=())
        with pytest.raises(UserError, match=message) as caught:
            open_source(keys(tmp_path), "train", 0)
        assert "\n" not in str(caught.value)


def test_paths_that_are_refused(tmp_path):
    path = write(tmp_path, content())
    for changes, message in (
        ({"root": ""}, "data.root is not set"),
        ({"train_images": "x"}, "'.*/x', the folder of images, is missing; check data.train_images"),
        ({"train_annotations": "x.json"}, "data.train_annotations '.*x.json' is not a file"),
        ({"source": "coco:x"}, "unknown data.source 'coco:x'"),
        ({"train_per_class": 3}, "data.train_per_class 3: the labels of 'coco' are only known by reading"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(keys(tmp_path, **changes), "train", 0)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"data.train_annotations '.*' is not JSON: .*; it may be truncated"):
        open_source(keys(tmp_path), "train", 0)
    plain = ConfigDict({"source": "coco", "root": str(tmp_path), "train_per_class": 0})
    with pytest.raises(UserError, match="'coco' has objects, which this task does not train on"):
        open_source(plain, "train", 0)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_encoded_masks_are_those_of_pycocotools(data):
    height, width = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    theirs = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    encoded = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(encoded, mask.shape), mask)
    assert to_rle(encoded, mask.shape) == {"size": [height, width], "counts": theirs}
    assert encode_runs(theirs.decode(), mask.shape) == encoded
    top, left, bottom, right = (data.draw(st.integers(0, 2)) for _ in range(4))
    whole = np.pad(mask, ((top, bottom), (left, right)))
    theirs = coco_mask.encode(np.asfortranarray(whole, np.uint8))["counts"]
    assert region_runs(mask, top, left, whole.shape) == theirs
