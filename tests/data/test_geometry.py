"""Geometry: images, maps, points and boxes end at one place; images have the bytes they always had."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx2_jax.data.crops import TRIES, eval_crop, random_crop_box
from cnx2_jax.data.decoding import decode, decode_crop
from cnx2_jax.data.fields import Image, Instances, SegmentationMap
from cnx2_jax.data.geometry import Geometry
from cnx2_jax.data.resizing import resize
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import EvalTransform, TrainTransform

IMAGE, MAP, INSTANCES = Image(), SegmentationMap(("mark",)), Instances(("mark",), most=3)
RADIUS = 4.0


def marked(height, width, point):
    """An image with a blob, a map with a disc, and a box of one pixel, all around one point."""
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    distances = np.hypot(rows[:, None] - point[0], columns[None] - point[1])
    blob = np.round(255 * np.exp(-((distances / RADIUS) ** 2))).astype(np.uint8)
    disc = (distances < RADIUS).astype(np.uint8)
    box = [point[0] - 0.5, point[1] - 0.5, point[0] + 0.5, point[1] + 0.5]
    return {
        "image": tf.constant(np.repeat(blob[..., None], 3, axis=2)),
        "segmentation": tf.constant(np.where(disc, 1, 0).astype(np.uint8)),
        "instances": {
            "boxes": tf.constant([box], tf.float32),
            "classes": tf.constant([0]),
        },
    }


FIELDS = {"image": IMAGE, "segmentation": MAP, "instances": INSTANCES}


def centroid(weights):
    weights = np.asarray(weights, float)
    places = np.indices(weights.shape) + 0.5
    return (places * weights).sum(axis=(1, 2)) / weights.sum()


def places(values):
    """Where the mark is, by each field."""
    box = values["instances"]["boxes"].numpy()[0]
    return {
        "image": centroid(values["image"][..., 0]),
        "segmentation": centroid(values["segmentation"] == 1),
        "boxes": (box[:2] + box[2:]) / 2,
    }


def drawn_step(data, kind, size, point, reach):
    """Draws a geometry of one kind that keeps the mark, which reaches `reach` around the point, whole."""
    before = [max(0, int(place - far)) for place, far in zip(point, reach, strict=True)]
    after = [max(0, int(side - place - far)) for side, place, far in zip(size, point, reach, strict=True)]
    first = [data.draw(st.integers(0, room)) for room in before]
    if kind == "crop":
        last = [data.draw(st.integers(0, room)) for room in after]
        height, width = (side - a - b for side, a, b in zip(size, first, last, strict=True))
        return Geometry(size, (height, width), crop=tf.constant([*first, height, width]))
    if kind == "resize":
        scales = [data.draw(st.floats(0.6, 1.6)) for _ in range(2)]
        resized = tuple(math.ceil(side * scale) for side, scale in zip(size, scales, strict=True))
        return Geometry(size, resized)
    if kind == "window":
        visible = (size[0] - first[0], size[1] - first[1])
        return Geometry(size, size, offset=tf.constant(first), visible=visible, mirrored=tf.constant(True))
    symmetry = [tf.constant(data.draw(st.booleans())) for _ in range(3)]
    return Geometry(size, size, None, None, None, *symmetry)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_mark_ends_at_one_place_in_every_field(data):
    size = data.draw(st.tuples(st.integers(40, 70), st.integers(40, 70)))
    point = np.array([data.draw(st.floats(14, side - 14)) for side in size])
    reach = np.full(2, 3 * RADIUS)
    values = marked(*size, point)
    kinds = data.draw(st.lists(st.sampled_from(["crop", "resize", "window", "symmetry", "pad"]), max_size=4))
    for kind in kinds:
        if kind == "pad":
            size = tuple(side + data.draw(st.integers(0, 20)) for side in size)
            values = {name: FIELDS[name].padded(value, size) for name, value in values.items()}
            continue
        step = drawn_step(data, kind, size, point, reach)
        values = {name: FIELDS[name].moved(value, step) for name, value in values.items()}
        point = step.points(tf.constant(point, tf.float32)).numpy().astype(float)
        reach *= np.divide(step.size, size) if kind == "resize" else 1
        if step.transposed:
            reach = reach[::-1]
        size = tuple(int(side) for side in step.result)
    assert values["image"].shape == (*size, 3) and values["segmentation"].shape == size
    for field, place in places(values).items():
        # Sampled to the nearest pixel twice, a map may be off by half a pixel of each grid on the way.
        if field in ("image", "boxes") or kinds.count("resize") < 2:
            assert np.abs(place - point).max() < 0.5, field


def test_points_follow_a_hand_worked_geometry():
    # Crop 40 x 80 at (10, 20), halve it, take 16 x 30 of it at (3, 4), mirror, flip, transpose.
    step = Geometry(
        (100, 200),
        (20, 40),
        crop=tf.constant([10, 20, 40, 80]),
        offset=tf.constant([3, 4]),
        visible=(16, 30),
        mirrored=True,
        flipped=True,
        transposed=True,
    )
    moved = step.points(tf.constant([[26.0, 40.0], [16.0, 88.0]]))
    np.testing.assert_allclose(moved, [[24, 11], [0, 16]])
    np.testing.assert_array_equal(step.result, [30, 16])


def test_boxes_are_clipped_and_stay_ordered():
    step = Geometry((10, 10), (5, 5), crop=tf.constant([0, 5, 10, 5]), mirrored=tf.constant(True))
    boxes = tf.constant([[0, 0, 10, 10], [2, 6, 4, 8], [0, 0, 10, 5]], tf.float32)
    np.testing.assert_allclose(step.boxes(boxes), [[0, 0, 5, 5], [1, 2, 2, 4], [0, 5, 5, 5]])


def former_train_image(encoded, seed, size, scale, ratio, flip):
    """Crop, resize and mirror as composed before there were fields, literally."""
    draws = tf.random.stateless_uniform([4 * TRIES + 1 + 0 + 1 + 4 * TRIES], seed)
    crop_draws, flip_draw, *_ = tf.split(draws, (4 * TRIES, 1, 0, 1, 4 * TRIES))
    image, _ = decode_crop(
        encoded,
        3,
        lambda height, width: random_crop_box(
            height, width, scale, ratio, tf.reshape(crop_draws, [4, TRIES])
        ),
    )
    image = resize(image, size, mirrored=(flip_draw[0] < 0.5) if flip else False)
    return tf.ensure_shape(image, [*size, 3])


def former_eval_image(encoded, size, crop_fraction):
    """The evaluation image as composed before there were fields, literally."""
    image = decode(encoded, 3)
    if max(size) >= 384:
        return resize(image, size)
    covered_height, covered_width = (math.floor(side / crop_fraction) for side in size)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.int64))
    resized = tf.cond(
        height * covered_width <= width * covered_height,
        lambda: tf.stack([covered_height, covered_height * width // height]),
        lambda: tf.stack([covered_width * height // width, covered_width]),
    )
    offset = tf.round((resized - tf.constant(size, tf.int64)) / 2)
    window = tf.concat([tf.cast(offset, tf.int32), tf.constant(size)], axis=0)
    return resize(image, tf.cast(resized, tf.int32), window=window)


def train_transform(flip):
    return TrainTransform(
        {"image": IMAGE}, (24, 32), (0.3, 1.0), (0.7, 1.4), Symmetries(flip), None, 0.0, (0.5,), (0.5,)
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [False, True])
def test_training_images_keep_their_bytes(photo, encode, kind, flip):
    encoded, transform = encode(photo.resize((160, 107)), kind), train_transform(flip)

    @tf.autograph.experimental.do_not_convert
    def both(index):
        seed = tf.stack([tf.constant(7, tf.int64), index])
        values = transform.finish(transform.decode({"image": encoded}, seed), seed)
        return values["image"], former_train_image(encoded, seed, (24, 32), (0.3, 1.0), (0.7, 1.4), flip)

    for ours, former in tf.data.Dataset.range(24).map(both).as_numpy_iterator():
        np.testing.assert_array_equal(ours, former)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (384, 100)])
def test_evaluation_images_keep_their_bytes(photo, encode, size):
    encoded, seed = encode(photo, "JPEG"), tf.zeros([2], tf.int64)
    transform = EvalTransform({"image": IMAGE}, size, 0.875)
    ours = transform.finish(transform.decode({"image": encoded}, seed), seed)["image"]
    np.testing.assert_array_equal(ours, former_eval_image(encoded, size, 0.875))


def executed(function, *arguments):
    """The types of the operations that the outputs of a traced function depend on, sorted."""
    traced = tf.function(function, autograph=False).get_concrete_function(*arguments)
    pending, seen = [output.op for output in traced.outputs], {}
    while pending:
        op = pending.pop()
        if op.name not in seen:
            seen[op.name] = op.type
            pending += [value.op for value in op.inputs] + list(op.control_inputs)
    return sorted(seen.values())


def test_training_images_cost_the_operations_they_always_did():
    spec, seed = tf.TensorSpec([], tf.string), tf.TensorSpec([2], tf.int64)
    transform = train_transform(True)
    ours = executed(lambda encoded, seed: transform.decode({"image": encoded}, seed)["image"], spec, seed)
    former = executed(
        lambda *both: former_train_image(*both, (24, 32), (0.3, 1.0), (0.7, 1.4), True), spec, seed
    )
    assert ours == former


def test_evaluation_crop_of_a_map_is_that_of_its_image():
    # Columns count up, so the map tells which of them were taken: 50 in the middle, every second one.
    values = tf.constant(np.tile(np.arange(100, dtype=np.uint8), (50, 1)))
    cropped = eval_crop(tf.constant(50), tf.constant(100), (25, 25), 1.0).map(values).numpy()
    np.testing.assert_array_equal(cropped, np.tile(np.arange(25, 75, 2), (25, 1)))
