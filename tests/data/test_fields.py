"""Fields: what each kind stores, decodes, pads and adds to a batch, and what stays on the host."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image as PillowImage

from cnx2_jax.data import faults, pipeline
from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.encoded_masks import encode_mask
from cnx2_jax.data.fields import (
    Identifier,
    Image,
    Instances,
    Label,
    MultiLabel,
    SegmentationMap,
    Value,
    decode_moved,
    example_arrays,
)
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.pipeline import Examples
from cnx2_jax.data.sources import Source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.train import sharding
from cnx2_jax.types import HOST

COUNT, CANVAS, SIDE = 6, (40, 48), 4
FIELDS = {
    "image": Image(),
    "label": Label(("even", "odd")),
    "labels": MultiLabel(("a", "b", "c")),
    "value": Value(2),
    "segmentation": SegmentationMap(tuple("abcdef")),
    "instances": Instances(("thing",), most=3, mask_side=SIDE),
    "id": Identifier(),
}


def height(index):
    return 20 + 2 * index


WIDTH = 30


def outline(object, height):
    """The mask of object c: its box, without the column at its right."""
    mask = np.zeros((height, WIDTH), bool)
    mask[: object + 1, : 2 * object + 1] = True
    return encode_mask(mask)


def source(encode) -> Source:
    """Six images of different heights; record i has i objects, and knows its number in every field."""
    noise = np.random.default_rng(0)
    images, maps, masks = [], [], []
    for index in range(COUNT):
        pixels = noise.integers(1, 256, (height(index), WIDTH, 3), np.uint8)
        images.append(encode(PillowImage.fromarray(pixels), "PNG"))
        classes = np.full((height(index), WIDTH), index, np.uint8)
        maps.append(encode(PillowImage.fromarray(classes), "PNG"))
        masks.append([outline(object, height(index)) for object in range(COUNT)])

    def read(index):
        count = tf.cast(index, tf.int32)
        edge = tf.cast(tf.range(count) + 1, tf.float32)[:, None]
        return {
            "image": tf.constant(images)[index],
            "label": count % 2,
            "labels": tf.range(count % 4),
            "value": tf.stack([tf.cast(index, tf.float64), 0.5]),
            "segmentation": tf.constant(maps)[index],
            "instances": {
                "boxes": tf.concat([tf.zeros([count, 2]), edge, 2 * edge], axis=1),
                "classes": tf.range(count),
                "masks": tf.constant(masks)[count, :count],
                "size": tf.stack([20 + 2 * count, WIDTH]),
            },
            "id": tf.strings.as_string(index),
        }

    return Source(COUNT, FIELDS, np.arange(COUNT) % 2, read, lambda index: f"record {index}")


@dataclasses.dataclass(frozen=True)
class Whole:
    """Leaves images as they are and pads them to a canvas."""

    fields: dict
    mirrored: bool = False

    def decode(self, record, seed):
        def draw(height, width):
            size = tf.stack([height, width])
            return Geometry(size, size, mirrored=self.mirrored)

        return decode_moved(self.fields, record, draw)

    def finish(self, values, seed):
        return example_arrays(self.fields, values, CANVAS)


@pytest.fixture(scope="module")
def examples(encode):
    data = source(encode)
    tolerance = faults.Tolerance("error", 0.0)
    return Examples(data, data, Whole(FIELDS), Whole(FIELDS), seed=0, batch_size=3, tolerance=tolerance)


@pytest.fixture(scope="module")
def batches(examples):
    return list(examples.eval_batches())


def stacked(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def test_images_and_maps_are_padded_at_bottom_and_right(batches):
    images, maps = stacked(batches, "image"), stacked(batches, "segmentation")
    assert images.shape == (COUNT, *CANVAS, 3) and images.dtype == np.uint8
    assert maps.shape == (COUNT, *CANVAS) and maps.dtype == np.uint8
    sizes = stacked(batches, "image_size")
    assert sizes.dtype == np.int32
    np.testing.assert_array_equal(sizes, [[height(index), WIDTH] for index in range(COUNT)])
    for index, (image, classes) in enumerate(zip(images, maps, strict=True)):
        inside = np.zeros(CANVAS, bool)
        inside[: height(index), :WIDTH] = True
        np.testing.assert_array_equal(image.all(axis=-1), inside)
        np.testing.assert_array_equal(classes, np.where(inside, index, 255))


def test_an_image_larger_than_the_canvas_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError):
        Image().padded(tf.zeros([41, 10, 3], tf.uint8), CANVAS)


def test_labels_and_values(batches):
    np.testing.assert_array_equal(stacked(batches, "label"), [0, 1, 0, 1, 0, 1])
    labels = stacked(batches, "labels")
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, [[i % 4 > c for c in range(3)] for i in range(COUNT)])
    values = stacked(batches, "value")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[index, 0.5] for index in range(COUNT)])


def test_instances_are_padded_and_the_smallest_left_out(batches):
    boxes, valid = stacked(batches, "boxes"), stacked(batches, "instances_valid")
    classes, masks = stacked(batches, "classes"), stacked(batches, "masks")
    assert boxes.shape == (COUNT, 3, 4) and boxes.dtype == np.float32
    assert classes.dtype == np.int32 and masks.shape == (COUNT, 3, SIDE, SIDE) and valid.dtype == np.bool_
    for index in range(COUNT):
        kept = list(range(max(0, index - 3), index))  # object c has the edge c + 1
        count = len(kept)
        np.testing.assert_array_equal(valid[index], np.arange(3) < count)
        np.testing.assert_array_equal(classes[index], kept + [0] * (3 - count))
        expected = np.reshape([[0, 0, c + 1, 2 * c + 1] for c in kept], (-1, 4))  # those of the masks
        np.testing.assert_array_equal(boxes[index, :count], expected)
        assert not boxes[index, count:].any() and not masks[index, count:].any()
        # Interpolated towards 0 beyond the box, the corners of the smallest masks are lost.
        assert masks[index, :count, 1:3, 1:3].all()


def test_instances_outside_of_the_geometry_are_dropped_with_their_classes_and_masks():
    field = Instances(("a", "b"), most=4, mask_side=2)
    boxes = tf.constant([[0, 0, 4, 4], [6, 6, 9, 9], [3, 3, 7, 7]], tf.float32)
    masks = np.zeros((3, 10, 10), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes.numpy().astype(int), strict=True):
        mask[top:bottom, left:right] = True
    masks[2, 3:6, 3:6] = False  # of 4 pixels in the crop one is left out
    value = {
        "boxes": boxes,
        "classes": tf.constant([0, 1, 1]),
        "masks": tf.constant([encode_mask(mask) for mask in masks]),
        "size": tf.constant([10, 10]),
    }
    step = Geometry((10, 10), (5, 5), crop=tf.constant([5, 5, 5, 5]))
    arrays = field.arrays("instances", field.moved(value, step), None)
    np.testing.assert_array_equal(arrays["instances_valid"], [True, True, False, False])
    np.testing.assert_array_equal(arrays["classes"], [1, 1, 0, 0])
    np.testing.assert_array_equal(arrays["boxes"][:2], [[1, 1, 4, 4], [0, 0, 2, 2]])
    np.testing.assert_array_equal(arrays["masks"][:2], [[[1, 1], [1, 1]], [[0, 1], [1, 1]]])


def test_of_equal_areas_the_earlier_instances_are_kept():
    field = Instances(("a",), most=2)
    value = {"boxes": tf.constant([[0.0, 0, 1, 1]] * 3), "classes": tf.constant([5, 6, 7])}
    arrays = field.arrays("objects", value, CANVAS)
    np.testing.assert_array_equal(arrays["classes"], [5, 6])
    assert arrays.keys() == {"boxes", "classes", "objects_valid"}


def test_geometry_moves_everything_together(encode):
    mirrored = Whole(FIELDS, mirrored=True)
    seed = tf.zeros([2], tf.int64)
    record = source(encode).read(tf.constant(4, tf.int64))
    plain, turned = (made.finish(made.decode(record, seed), seed) for made in (Whole(FIELDS), mirrored))
    np.testing.assert_array_equal(turned["image"][:28, :WIDTH], plain["image"][:28, :WIDTH][:, ::-1])
    np.testing.assert_array_equal(turned["boxes"][0], [0, WIDTH - 3, 2, WIDTH])
    for name in ("label", "labels", "value"):
        np.testing.assert_array_equal(turned[name], plain[name])


def test_host_only_fields_never_go_to_a_device(batches, examples):
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1}), jax.devices()[:1])
    ids = [name for batch in batches for name in batch[HOST]["id"]]
    assert ids == [str(index).encode() for index in range(COUNT)]
    for batch in sharding.put_batches(batches, mesh):
        assert HOST not in batch and all(isinstance(array, jax.Array) for array in batch.values())
    for batch, given in zip(sharding.put_batches(batches, mesh, keep_host=True), batches, strict=True):
        assert batch.keys() == given.keys()
        assert batch[HOST]["id"] is given[HOST]["id"] and isinstance(batch[HOST]["id"], np.ndarray)
    assert set(next(examples.train_batches(0))[HOST]["id"]) < set(ids)


def test_an_unreadable_record_of_many_fields_is_blank_in_evaluation(encode, capsys):
    data = source(encode)

    def read(index):
        record = data.read(index)
        return {**record, "image": tf.where(index == 5, b"no image", record["image"])}

    broken = dataclasses.replace(data, read=read)
    tolerance = faults.Tolerance("skip", 0.5)
    made = list(pipeline.one_pass(broken, Whole(FIELDS), batch_size=3, tolerance=tolerance))
    np.testing.assert_array_equal(stacked(made, "unreadable"), [False] * 5 + [True])
    np.testing.assert_array_equal(stacked(made, "mask"), [True] * 5 + [False])
    assert not stacked(made, "instances_valid")[5].any() and not stacked(made, "image")[5].any()
    assert stacked(made, "image_size")[5].tolist() == [0, 0]
    assert "record 5" in capsys.readouterr().err


@pytest.fixture(scope="module")
def message_of(encode):
    """The function `message(content)`: the error of a record whose map is a PNG with this content."""
    data = source(encode)
    tolerance = faults.Tolerance("error", 0.0)

    def message(content):
        wrong = dataclasses.replace(
            data, read=lambda index: {**data.read(index), "segmentation": tf.constant(content)}
        )
        with pytest.raises(UserError) as caught:
            next(pipeline.one_pass(wrong, Whole(FIELDS), batch_size=1, tolerance=tolerance))
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("I;16", "greyscale of 16 bits"),
        ("RGB", "RGB of 8 bits"),
        ("RGBA", "RGBA of 8 bits"),
        ("LA", "greyscale with alpha of 8 bits"),
    ],
)
def test_maps_that_do_not_hold_classes_are_refused(encode, message_of, mode, form):
    message = message_of(encode(PillowImage.new(mode, (WIDTH, 20)), "PNG"))
    assert message.startswith(f"map 'record 0' is in {form} instead of index form; save the class of each")


def test_a_map_names_what_is_wrong_with_it(encode, message_of):
    jpeg = encode(PillowImage.new("L", (WIDTH, 20)), "JPEG")
    assert message_of(jpeg) == "map 'record 0' is not a PNG; maps are PNGs of class indices"
    cut = encode(PillowImage.new("L", (WIDTH, 20)), "PNG")[:60]
    assert message_of(cut) == (
        "map 'record 0' is not a readable PNG; it may be truncated: repair or remove it"
    )
    assert message_of(encode(PillowImage.new("L", (WIDTH, 20), 6), "PNG")) == (
        "map 'record 0' has the value 6, but there are 6 classes, from 0 on, and data.ignore is 255; "
        "check data.classes and data.ignore"
    )
    assert message_of(encode(PillowImage.new("L", (20, WIDTH)), "PNG")) == (
        "image 'record 0' has 20 x 30 pixels (height x width), but its map 30 x 20; make both the same size"
    )


def test_zero_is_unlabelled_where_classes_start_at_one(encode):
    field = SegmentationMap(("a", "b"), ignore=9, unlabelled_first=True)
    stored = PillowImage.fromarray(np.array([[0, 1], [2, 10]], np.uint8))
    np.testing.assert_array_equal(field.decode(encode(stored, "PNG")), [[9, 0], [1, 9]])
    with pytest.raises(tf.errors.OpError, match="has the value 3, but there are 2 classes, from 1 on"):
        field.decode(encode(PillowImage.new("L", (2, 2), 3), "PNG"))


def test_a_map_holds_255_classes_and_a_value_beside_them():
    names = tuple(map(str, range(256)))
    assert SegmentationMap(names[:255]).ignore == 255
    with pytest.raises(UserError, match="256 classes are more than the 255"):
        SegmentationMap(names)
    for ignore in (2, -1, 256):
        with pytest.raises(UserError, match=rf"data\.ignore {ignore} must be from 3, .* to 255"):
            SegmentationMap(names[:3], ignore=ignore)


def test_class_names_are_those_of_the_first_field_that_has_any(encode):
    assert source(encode).class_names == ("even", "odd")
    unnamed = dataclasses.replace(
        source(encode), fields={"image": Image(), "label": Label(()), "id": Identifier()}
    )
    assert unnamed.class_names == ()


def test_geometric_augmentation_is_refused_beside_aligned_fields():
    for name in ("segmentation", "instances"):
        fields = {"image": Image(), name: FIELDS[name]}
        with pytest.raises(
            UserError, match=rf"data\.augment 'rand-m9-inc1' .*'{name}'; set data\.augment to"
        ):
            make_augmentation("rand-m9-inc1", (0, 0, 0), fields)
        assert make_augmentation("jitter-0.4", (0, 0, 0), fields) is not None
    assert make_augmentation("rand-m9-inc1", (0, 0, 0), {"image": Image(), "label": Label(())}) is not None


def test_photometric_operations_touch_images_alone(encode):
    record = source(encode).read(tf.constant(3, tf.int64))
    values = Whole(FIELDS).decode(record, tf.zeros([2], tf.int64))
    for name, field in FIELDS.items():
        changed = field.changed(values[name], tf.bitwise.invert)
        assert (changed is values[name]) == (name != "image")
    np.testing.assert_array_equal(
        FIELDS["image"].changed(values["image"], tf.bitwise.invert), 255 - values["image"]
    )


def test_only_images_decide_the_geometry():
    with pytest.raises(TypeError, match="Label has no height and width"):
        decode_moved({"label": Label(())}, {"label": tf.constant(0)}, lambda h, w: None, leader="label")
