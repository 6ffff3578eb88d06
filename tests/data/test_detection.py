"""Detection's examples: large-scale jitter by its definition, boxes against masks, whole images."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from cnx2_jax.data.detection import REDRAWS, DetectionData, JitterTransform
from cnx2_jax.data.detection_keys import add_detection_keys
from cnx2_jax.data.encoded_masks import encode_mask
from cnx2_jax.data.fields import Image, Instances
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.resizing import PLAIN_BILINEAR, resize, resize_nearest
from cnx2_jax.data.symmetries import Symmetries, Symmetry
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults
from cnx2_jax.types import HOST

SIZE, SIDE, MOST = (24, 32), 6, 5
FIELDS = {"image": Image(), "instances": Instances(("a", "b"), MOST, SIDE)}


def config(source="scenes:6", root="", **changes):
    values = defaults("classify")
    add_detection_keys(values.data)
    values.update({"batch_size": 2, "image_size": SIZE})
    keys = {"max_instances": MOST, "mask_side": SIDE, "eval_long": 90, "eval_short": 40}
    values.data.update({"source": source, "root": str(root), "flip": True, **keys})
    values.update_from_flattened_dict(changes)
    return values


def transform(**changes):
    options = {"size": SIZE, "ratios": (0.1, 2.0), "symmetries": Symmetries(flip=True), "augment": None}
    return JitterTransform(FIELDS, **{**options, **changes})


def traced(made, record):
    """A function of the seed that makes the example of a record."""
    return tf.function(lambda seed: made.finish(made.decode(record, seed), seed), autograph=False)


def box_of(mask):
    """The box of a mask with a pixel: y0, x0, y1, x1."""
    (y0, *_, y1), (x0, *_, x1) = (np.flatnonzero(mask.any(axis=axis)).repeat(2) for axis in (1, 0))
    return np.array([y0, x0, y1 + 1, x1 + 1])


def assert_resampled(crop, mask):
    """Compares a crop with the definition, cell by cell: interpolated along short axes, else the nearest."""
    for i, j in np.ndindex(SIDE, SIDE):
        weights = []
        for length, cell in zip(mask.shape, (i, j), strict=True):
            place = (cell + 0.5) * length / SIDE
            if length < SIDE:
                weights.append(np.maximum(1 - np.abs(place - 0.5 - np.arange(length)), 0))
            else:
                weights.append(np.arange(length) == int(place))
        value = weights[0] @ mask @ weights[1]
        assert crop[i, j] == (value >= 0.5) or abs(value - 0.5) < 1e-6


def stored(image, masks, classes, encode):
    boxes = [box_of(mask) for mask in masks]
    return {
        "image": tf.constant(encode(PillowImage.fromarray(image), "PNG")),
        "instances": {
            "boxes": tf.constant(np.float32(boxes).reshape(-1, 4)),
            "classes": tf.constant(np.int32(classes)),
            "masks": tf.constant([encode_mask(mask) for mask in masks], tf.string),
            "size": tf.constant(image.shape[:2]),
        },
    }


@pytest.fixture(scope="module")
def example(encode):
    """An image, four objects in it, and the record of both."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), np.uint8)
    rows, columns = np.indices((50, 70))
    masks = [
        np.hypot(rows - y, columns - x) < radius
        for y, x, radius in ((10, 10, 8), (25, 40, 20), (44, 65, 5), (30, 30, 1))
    ]
    classes = [0, 1, 1, 0]
    return image, masks, classes, stored(image, masks, classes, encode)


def test_training_is_large_scale_jitter_by_its_definition(example):
    image, masks, classes, record = example
    made = transform()
    example_at = traced(made, record)
    sizes, counts, mirrored = [], [], []
    for position in range(16):
        seed = tf.constant([3, position], tf.int64)
        crops, flip, _ = (part.numpy() for part in made._draws(seed))
        ratio = 0.1 + 1.9 * float(crops[0])
        factor = min(int(32 * ratio) / 70, int(24 * ratio) / 50)
        size = [max(1, int(side * factor + 0.5)) for side in image.shape[:2]]
        margins = [max(side - limit, 0) for side, limit in zip(size, SIZE, strict=True)]
        top, left = (int(draw * (margin + 1)) for draw, margin in zip(crops[1:3], margins, strict=True))
        window = np.s_[top : top + SIZE[0], left : left + SIZE[1]]
        flipped = flip[0] < 0.5
        expected_image = resize(image, size, kernel=PLAIN_BILINEAR).numpy()[window]
        shown = [resize_nearest(mask.astype(np.uint8), size).numpy()[window] > 0 for mask in masks]
        if flipped:
            expected_image, shown = expected_image[:, ::-1], [mask[:, ::-1] for mask in shown]
        kept = [place for place, mask in enumerate(shown) if mask.any()]

        arrays = {name: array.numpy() for name, array in example_at(seed).items()}
        height, width = expected_image.shape[:2]
        np.testing.assert_array_equal(arrays["image_size"], [height, width])
        # A window is computed in other blocks than the whole, and halves may be rounded the other way.
        difference = arrays["image"][:height, :width].astype(int) - expected_image
        assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.03
        assert not arrays["image"][height:].any() and not arrays["image"][:, width:].any()
        assert arrays["image"].shape == (*SIZE, 3) and arrays["masks"].shape == (MOST, SIDE, SIDE)
        np.testing.assert_array_equal(arrays["instances_valid"], np.arange(MOST) < len(kept))
        np.testing.assert_array_equal(arrays["classes"][: len(kept)], [classes[place] for place in kept])
        for box, crop, place in zip(arrays["boxes"], arrays["masks"], kept, strict=False):
            y0, x0, y1, x1 = expected = box_of(shown[place])
            np.testing.assert_array_equal(box, expected)
            assert_resampled(crop, shown[place][y0:y1, x0:x1])
        assert not arrays["boxes"][len(kept) :].any() and not arrays["masks"][len(kept) :].any()
        sizes.append(size[0])
        counts.append(len(kept))
        mirrored.append(flipped)
    assert min(sizes) < 8 and max(sizes) > 36 and {1, 2, 3, 4} & set(counts) and 3 < sum(mirrored) < 13


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_boxes_and_masks_through_any_geometry_are_those_of_moved_pixels(data):
    """Calls what the graph calls, and compares each mask with the moved map of its pixels."""
    height, width = data.draw(st.tuples(st.integers(2, 16), st.integers(2, 16)))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    offset = [data.draw(st.integers(0, side - 1)) for side in size]
    visible = [data.draw(st.integers(1, side - first)) for side, first in zip(size, offset, strict=True)]
    mirrored, flipped, transposed = (data.draw(st.booleans()) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    masks = rng.random((3, height, width)) < rng.choice([0.0, 0.02, 0.1, 0.7])
    symmetry = {"mirrored": mirrored, "flipped": flipped, "transposed": transposed}
    step = Geometry((height, width), size, offset=tf.constant(offset), visible=tuple(visible), **symmetry)
    stored = {
        "boxes": tf.constant([[0, 0, height, width]] * 3, tf.float32),
        "classes": tf.range(3),
        "masks": tf.constant([encode_mask(mask) for mask in masks]),
        "size": tf.constant([height, width]),
    }
    kept = {name: rows.numpy() for name, rows in FIELDS["instances"].moved(stored, step).items()}
    boxes, crops, found = (np.zeros(shape) for shape in ((3, 4), (3, SIDE, SIDE), (3,)))
    boxes[kept["classes"]], crops[kept["classes"]], found[kept["classes"]] = kept["boxes"], kept["masks"], 1
    window = np.s_[offset[0] : offset[0] + visible[0], offset[1] : offset[1] + visible[1]]
    for mask, box, crop, seen in zip(masks, boxes, crops, found, strict=True):
        moved = resize_nearest(mask.astype(np.uint8), size).numpy()[window]
        moved = moved[:, ::-1] if mirrored else moved
        moved = moved[::-1] if flipped else moved
        moved = moved.T if transposed else moved
        assert seen == moved.any()
        if seen:
            y0, x0, y1, x1 = expected = box_of(moved)
            np.testing.assert_array_equal(box, expected)
            assert_resampled(crop, moved[y0:y1, x0:x1])
        else:
            assert not box.any() and not crop.any()


def test_a_geometry_with_a_crop_says_which_pixels_it_shows():
    values = np.arange(80, dtype=np.int32).reshape(8, 10)
    step = Geometry((8, 10), (9, 5), crop=tf.constant([1, 2, 6, 7]), mirrored=True)
    rows, columns = step.places()
    np.testing.assert_array_equal(values[rows.numpy()][:, columns.numpy()], step.map(tf.constant(values)))


def test_crops_without_boxes_stay_and_those_that_lose_every_pixel_are_redrawn(encode):
    """The box of a ring meets crops in which none of its pixels is: such a crop is redrawn."""
    rows, columns = np.indices((90, 90))
    distance = np.hypot(rows - 45, columns - 45)
    ring = (distance < 44) & (distance > 43)
    made = transform(ratios=(3.7, 3.8), symmetries=Symmetries())
    example_at = traced(made, stored(np.zeros((90, 90, 3), np.uint8), [ring], [1], encode))
    redrawn = 0
    for position in range(6):
        seed = tf.constant([0, position], tf.int64)
        crops = made._draws(seed)[0].numpy().reshape(1 + REDRAWS, 3)
        shown = []
        for draws in crops:
            step = made._geometry(tf.constant([90, 90]), tf.constant(draws), Symmetry())
            shown.append(step.map(tf.constant(ring.astype(np.uint8))).numpy())
        chosen = next((place for place, mask in enumerate(shown) if mask.any()), REDRAWS)
        redrawn += chosen > 0
        arrays = example_at(seed)
        assert arrays["instances_valid"].numpy().any() == shown[chosen].any()
        if shown[chosen].any():
            np.testing.assert_array_equal(arrays["boxes"][0], box_of(shown[chosen]))
    assert redrawn > 0

    corner = np.zeros((90, 90), bool)
    corner[:4, :4] = True
    example_at = traced(made, stored(np.zeros((90, 90, 3), np.uint8), [corner], [1], encode))
    seeds = [tf.constant([0, position], tf.int64) for position in range(6)]
    empty = 0
    for seed in seeds:
        step = made._geometry(tf.constant([90, 90]), made._draws(seed)[0][:3], Symmetry())
        first = step.map(tf.constant(corner.astype(np.uint8))).numpy().any()
        assert example_at(seed)["instances_valid"].numpy().any() == first
        empty += not first
    assert empty > 3


class Inverted:
    """An augmentation that draws one number and ignores it."""

    draws = 1

    def apply(self, image, draws):
        return 255 - image


def test_photometric_changes_touch_the_image_alone_and_not_its_padding(example):
    *_, record = example
    seed = tf.constant([0, 1], tf.int64)
    made = transform(augment=Inverted())
    values = made.decode(record, seed)
    arrays = made.finish(values, seed)
    height, width = values["image"].shape[:2]
    np.testing.assert_array_equal(arrays["image"][:height, :width], 255 - values["image"])
    assert not arrays["image"][height:].numpy().any() and not arrays["image"][:, width:].numpy().any()
    count = len(values["instances"]["classes"])
    np.testing.assert_array_equal(arrays["boxes"][:count], values["instances"]["boxes"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encode):
    """A set in COCO's format with images of several sizes; one is turned upright, one has no objects."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number, (height, width) in enumerate([(40, 60), (60, 40), (33, 90), (31, 50), (40, 40)], 1):
            exif = PillowImage.Exif()
            exif[0x0112] = 6 if number == 2 else 1
            noise = PillowImage.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
            noise.resize((height, width) if number == 2 else (width, height)).save(
                root / f"{split}2017/{number}.jpg", exif=exif, quality=95
            )
            images.append({"id": 10 * number, "height": height, "width": width, "file_name": f"{number}.jpg"})
            for _ in range(0 if number == 5 else 7 if number == 1 else 1):
                x, y, side = (round(float(each), 1) for each in (*rng.uniform(0, 20, 2), rng.uniform(4, 10)))
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": 10 * number, "category_id": 4, "area": side**2,
                     "bbox": [x, y, side, side], "iscrowd": 0, "segmentation": [polygon]}
                )  # fmt: skip
        made = {"images": images, "annotations": annotations, "categories": [{"id": 4, "name": "box"}]}
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(made))
    return root


@pytest.fixture(scope="module")
def data(folder):
    return DetectionData(config("coco", folder))


def test_images_without_objects_or_with_short_sides_are_left_out_of_training(folder, data, capsys):
    DetectionData(config("coco", folder))
    err = capsys.readouterr().err
    assert (
        len(err.splitlines()) == 1 and "1 training images have more than data.max_instances 5 objects" in err
    )
    assert (data.num_train, data.num_val) == (3, 5) and data.class_names == ("box",)
    names = {data.train.describe(index).split("/")[-1] for index in range(3)}
    assert names == {"1.jpg", "2.jpg", "3.jpg"}
    np.testing.assert_array_equal(data.annotations.image_ids, [10, 20, 30, 40, 50])


def test_batches_resume_and_divide_over_hosts(data):
    batches = list(itertools.islice(data.train_batches(0), 3))
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((2, *SIZE, 3), np.uint8),
            "image_size": ((2, 2), np.int32),
            "boxes": ((2, MOST, 4), np.float32),
            "classes": ((2, MOST), np.int32),
            "masks": ((2, MOST, SIDE, SIDE), np.uint8),
            "instances_valid": ((2, MOST), np.bool_),
        }
    resumed = next(data.train_batches(2))
    hosts = [next(data.train_batches(2, process_index=i, process_count=2)) for i in range(2)]
    for name, array in batches[2].items():
        np.testing.assert_array_equal(resumed[name], array)
        np.testing.assert_array_equal(np.concatenate([host[name] for host in hosts]), array)


def test_evaluation_has_whole_images_on_one_canvas_and_their_ids(data):
    batches = list(data.eval_batches())
    assert [batch["mask"].tolist() for batch in batches] == [[True, True], [True, True], [True, False]]
    rows = [(batch, row) for batch in batches for row in range(2) if batch["mask"][row]]
    for (batch, row), number, (height, width) in zip(
        rows, (10, 20, 30, 40, 50), data.annotations.sizes, strict=True
    ):
        factor = min(90 / max(height, width), 40 / min(height, width))
        size = [int(height * factor + 0.5), int(width * factor + 0.5)]
        assert batch["image"].shape == (2, 64, 96, 3) and batch[HOST]["id"][row] == number
        np.testing.assert_array_equal(batch["image_size"][row], size)
        np.testing.assert_array_equal(batch[HOST]["image_size"][row], size)
        np.testing.assert_array_equal(batch[HOST]["original_size"][row], [height, width])
        stored = data.val.read(tf.constant(number // 10 - 1, tf.int64))["image"]
        expected = resize(Image().decode(stored), size, kernel=PLAIN_BILINEAR)
        image = batch["image"][row]
        np.testing.assert_array_equal(image[: size[0], : size[1]], expected)
        assert not image[size[0] :].any() and not image[:, size[1] :].any()


def test_an_image_of_another_size_than_its_annotations_is_named(folder, data):
    path = folder / "train2017/1.jpg"
    whole = path.read_bytes()
    try:
        PillowImage.new("RGB", (61, 40)).save(path)
        message = (
            r"image '.*1\.jpg' has 40 x 61 pixels \(height x width\), but its annotations are for 40 x 60"
        )
        with pytest.raises(UserError, match=message) as caught:
            list(itertools.islice(data.train_batches(0), 2))
        assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(whole)


def test_splits_with_other_categories_are_refused(folder, tmp_path):
    path = folder / "annotations/instances_val2017.json"
    (tmp_path / "val.json").write_text(path.read_text().replace('"box"', '"bag"'))
    changed = config("coco", folder, **{"data.val_annotations": str(tmp_path / "val.json")})
    with pytest.raises(
        UserError, match=r"category 4 'bag' is not in data\.train_annotations 'annotations/inst"
    ):
        DetectionData(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "digits"}, "data.source 'digits' has no objects; detection takes coco or scenes"),
        ({"data.val_source": "folder"}, "data.val_source 'folder': detection takes its validation images"),
        ({"data.ratio_range": (2.0, 0.5)}, r"data.ratio_range \(2.0, 0.5\) must be two positive numbers"),
        ({"model.in_chans": 4}, "model.in_chans 4: image files are read with 1 or 3"),
        ({"data.augment": "rand-m9-inc1"}, "but not their 'instances'; set data.augment to distort"),
    ],
)
def test_user_errors(changes, message):
    values = config()
    with values.ignore_type():
        values.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        DetectionData(values)


def test_scenes_give_boxes_as_well(data):
    scenes = DetectionData(config())
    assert scenes.class_names == tuple("0123456789") and scenes.num_val == 6
    fields = scenes.train.fields["instances"]
    assert fields == dataclasses.replace(fields, most=MOST, mask_side=SIDE)
