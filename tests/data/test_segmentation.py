"""Segmentation's examples: mmsegmentation's resizing, crops and padding; whole images to evaluate."""

import itertools

import numpy as np
import pytest
from PIL import Image as PillowImage
from PIL import ImageOps

from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.fields import Image, SegmentationMap
from cnx2_jax.data.resizing import PLAIN_BILINEAR, resize, resize_nearest
from cnx2_jax.data.segmentation import (
    REDRAWS,
    SegmentationData,
    SegmentationTransform,
    prediction_images,
)
from cnx2_jax.data.segmentation_keys import add_segmentation_keys
from cnx2_jax.data.sources.folder import open_files
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults

FIELDS = {"image": Image(), "map": SegmentationMap(tuple("abcd"))}
SIZE = (24, 32)


def config(source="scenes:6", root="", **changes):
    values = defaults("classify")
    add_segmentation_keys(values.data)
    values.update({"batch_size": 2, "image_size": SIZE})
    bounds = {"resize_long": 80, "resize_short": 40, "eval_long": 100, "eval_short": 50}
    values.data.update({"source": source, "root": str(root), "flip": True, **bounds})
    values.update_from_flattened_dict(changes)
    return values


def transform(**changes):
    options = {
        "size": SIZE, "bounds": (80, 40), "ratios": (0.5, 2.0), "class_share": 0.75,
        "symmetries": Symmetries(flip=True), "augment": None,
    }  # fmt: skip
    return SegmentationTransform(FIELDS, **{**options, **changes})


def record(classes, encode, image=None):
    """A stored record whose image shows its classes as grey levels, if not given."""
    image = np.repeat(40 * classes[..., None], 3, axis=2).astype(np.uint8) if image is None else image
    return {
        "image": tf.constant(encode(PillowImage.fromarray(image), "PNG")),
        "map": tf.constant(encode(PillowImage.fromarray(classes), "PNG")),
    }


def mostly_one_class(height=50, width=70):
    """Class 3, and a small corner of the others and of pixels without a class."""
    classes = np.full((height, width), 3, np.uint8)
    classes[:16, :20] = np.random.default_rng(0).integers(0, 3, (4, 5), np.uint8).repeat(4, 0).repeat(4, 1)
    classes[:6, :12] = 255
    return classes


def mmsegmentation_crop(classes, draws, share):
    """RandomCrop.crop_bbox, by its definition; returns the offset and how many crops were drawn."""
    margin_h, margin_w = max(classes.shape[0] - SIZE[0], 0), max(classes.shape[1] - SIZE[1], 0)
    boxes = [(int(y * (margin_h + 1)), int(x * (margin_w + 1))) for y, x in draws]
    top, left = boxes[0]
    for attempt in range(10):
        crop = classes[top : top + SIZE[0], left : left + SIZE[1]]
        labels, counts = np.unique(crop, return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and np.max(counts) / np.sum(counts) < share:
            return (top, left), attempt
        top, left = boxes[attempt + 1]
    return (top, left), 10


def test_training_is_mmsegmentations_resize_crop_and_flip(encode):
    made, classes = transform(), mostly_one_class()
    noise = np.random.default_rng(1).integers(0, 256, (*classes.shape, 3), np.uint8)
    stored = record(classes, encode, noise)
    decode, finish = tf.function(made.decode, autograph=False), tf.function(made.finish, autograph=False)
    redraws, mirrored = [], []
    for position in range(40):
        seed = tf.constant([3, position], tf.int64)
        ratio, crops, flip, _ = (part.numpy() for part in made._draws(seed))
        ratio = 0.5 + 1.5 * float(ratio[0])
        factor = min(int(80 * ratio) / 70, int(40 * ratio) / 50)
        size = [int(side * factor + 0.5) for side in classes.shape]
        resized = resize_nearest(classes, size).numpy()
        (top, left), redrawn = mmsegmentation_crop(resized, crops.reshape(-1, 2), 0.75)
        box = np.s_[top : top + SIZE[0], left : left + SIZE[1]]
        image, labels = resize(noise, size, kernel=PLAIN_BILINEAR).numpy()[box], resized[box]
        if flip[0] < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        arrays = finish(decode(stored, seed), seed)
        height, width = labels.shape
        np.testing.assert_array_equal(arrays["image_size"], [height, width])
        # A window is computed in other blocks than the whole, and halves may be rounded the other way.
        difference = arrays["image"][:height, :width].numpy().astype(int) - image
        assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
        np.testing.assert_array_equal(arrays["map"][:height, :width], labels)
        assert arrays["image"].shape == (*SIZE, 3) and arrays["map"].shape == SIZE
        redraws.append(redrawn)
        mirrored.append(flip[0] < 0.5)
    # The first crop, another one, and the last one unchecked.
    assert {0, 10} < set(redraws) and REDRAWS == 10
    assert 8 < sum(mirrored) < 32


def test_crops_show_other_classes_more_often_when_redrawn(encode):
    stored = record(mostly_one_class(100, 140), encode)

    def dominated(share):
        made, count = transform(class_share=share, ratios=(1.0, 1.0), bounds=(140, 100)), 0
        decode = tf.function(made.decode, autograph=False)
        for position in range(40):
            classes = decode(stored, tf.constant([0, position], tf.int64))["map"].numpy()
            count += int((classes == 3).sum() >= 0.9 * (classes != 255).sum())
        return count

    assert dominated(0.9) < dominated(1.0) - 5


def test_small_images_are_padded(encode):
    stored = record(np.full((10, 15), 2, np.uint8), encode)
    made = transform(bounds=(15, 10), ratios=(1.0, 1.0))
    seed = tf.constant([0, 0], tf.int64)
    arrays = made.finish(made.decode(stored, seed), seed)
    np.testing.assert_array_equal(arrays["image_size"], [10, 15])
    inside = np.zeros(SIZE, bool)
    inside[:10, :15] = True
    np.testing.assert_array_equal(arrays["image"], np.where(inside[..., None], [80, 80, 80], 0))
    np.testing.assert_array_equal(arrays["map"], np.where(inside, 2, 255))


def test_turned_images_and_maps_fit_the_square_canvas(encode):
    classes = np.random.default_rng(2).integers(0, 4, (10, 15), np.uint8)
    stored, size = record(classes, encode), (16, 16)
    options = {"size": size, "bounds": (15, 10), "ratios": (1.0, 1.0)}
    made = transform(symmetries=Symmetries(vflip=True, quarter_turns=True), **options)
    example_at = tf.function(lambda seed: made.finish(made.decode(stored, seed), seed), autograph=False)
    views = [np.rot90(view, turns) for view in (classes, classes[::-1]) for turns in range(4)]
    seen = set()
    for position in range(30):
        arrays = {name: array.numpy() for name, array in example_at(tf.constant([1, position])).items()}
        height, width = arrays["image_size"]
        found = arrays["map"][:height, :width]
        seen |= {place for place, view in enumerate(views) if np.array_equal(view, found)}
        np.testing.assert_array_equal(arrays["image"][:height, :width, 0], 40 * found)
        assert (arrays["map"][height:] == 255).all() and (arrays["map"][:, width:] == 255).all()
    assert len(seen) == 8


def test_photometric_changes_touch_the_image_alone_and_not_its_padding(encode):
    stored = record(np.full((10, 15), 2, np.uint8), encode)
    augment = make_augmentation("distort", (0, 0, 0), FIELDS)
    made = transform(bounds=(15, 10), ratios=(1.0, 1.0), augment=augment)
    decode, finish = tf.function(made.decode, autograph=False), tf.function(made.finish, autograph=False)
    levels = set()
    for position in range(8):
        seed = tf.constant([0, position], tf.int64)
        arrays = finish(decode(stored, seed), seed)
        levels.add(int(arrays["image"][0, 0, 0]))
        assert not arrays["image"][10:].numpy().any() and not arrays["image"][:, 15:].numpy().any()
        assert (arrays["map"][:10, :15].numpy() == 2).all()
    assert len(levels) > 3


def test_batches_resume_and_divide_over_hosts():
    data = SegmentationData(config(**{"data.augment": "distort"}))
    assert (data.num_train, data.num_val) == (6, 6) and len(data.class_names) == 11
    batches = list(itertools.islice(data.train_batches(0), 3))
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((2, *SIZE, 3), np.uint8),
            "image_size": ((2, 2), np.int32),
            "map": ((2, *SIZE), np.uint8),
        }
    resumed = next(data.train_batches(2))
    hosts = [next(data.train_batches(2, process_index=i, process_count=2)) for i in range(2)]
    for name, array in batches[2].items():
        np.testing.assert_array_equal(resumed[name], array)
        np.testing.assert_array_equal(np.concatenate([host[name] for host in hosts]), array)


SIDES = [(40, 60), (60, 40), (20, 90), (30, 30)]


@pytest.fixture
def folder(tmp_path):
    """One training image, and validation images of several sizes, one of them to be turned upright."""
    rng = np.random.default_rng(0)
    for split, sizes in (("train", SIDES[:1]), ("val", SIDES)):
        for index, (height, width) in enumerate(sizes):
            paths = [tmp_path / kind / split for kind in ("images", "masks")]
            for path in paths:
                path.mkdir(parents=True, exist_ok=True)
            exif = PillowImage.Exif()
            exif[0x0112] = 6 if split == "val" and index == 1 else 1
            noise = rng.integers(0, 256, (2, 3, 3), np.uint8)
            stored = (height, width) if exif[0x0112] == 6 else (width, height)
            image = PillowImage.fromarray(noise).resize(stored)
            image.save(paths[0] / f"{index}.jpg", exif=exif, quality=95)
            classes = rng.integers(0, 3, (height, width), np.uint8)
            PillowImage.fromarray(classes).save(paths[1] / f"{index}.png")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    return tmp_path


def folder_config(folder, **changes):
    classes = str(folder / "names.txt")
    return config("masks", folder, **{"data.classes": classes, "batch_size": 1, **changes})


def upright(path):
    return np.asarray(ImageOps.exif_transpose(PillowImage.open(path)))


def test_evaluation_has_whole_images_at_every_scale_and_whole_maps(folder):
    data = SegmentationData(folder_config(folder, **{"data.eval_scales": (1.0, 0.5)}))
    batches = list(data.eval_batches())
    assert len(batches) == 4
    for index, (height, width) in enumerate(SIDES):
        batch = batches[index]
        assert set(batch) == {
            *("image", "image_size", "image_1", "image_1_size", "map", "map_size", "mask"),
        }
        image = upright(folder / f"images/val/{index}.jpg")
        for suffix, long, short, canvas in (("", 100, 50, (96, 128)), ("_1", 50, 25, (64, 64))):
            factor = min(long / max(height, width), short / min(height, width))
            size = [int(height * factor + 0.5), int(width * factor + 0.5)]
            array = batch[f"image{suffix}"][0]
            np.testing.assert_array_equal(batch[f"image{suffix}_size"][0], size)
            expected = resize(image, size, kernel=PLAIN_BILINEAR)
            np.testing.assert_array_equal(array[: size[0], : size[1]], expected)
            assert array.shape == (*canvas, 3)
            assert not array[size[0] :].any() and not array[:, size[1] :].any()
        classes = np.asarray(PillowImage.open(folder / f"masks/val/{index}.png"))
        assert batch["map"].shape == (1, 60, 90) and batch["map"].dtype == np.uint8
        np.testing.assert_array_equal(batch["map_size"], [[height, width]])
        np.testing.assert_array_equal(batch["map"][0, :height, :width], classes)
        assert (batch["map"] == 255).sum() == 60 * 90 - height * width


def test_images_to_predict_are_prepared_as_for_evaluation(folder):
    settings = folder_config(folder, **{"data.eval_scales": (1.0, 0.5)})
    batches = SegmentationData(settings).eval_batches()
    source = open_files([str(folder / "images/val")])
    prepared = list(prediction_images(source, settings))
    assert [each.original.shape[:2] for each in prepared] == SIDES
    for each, batch in zip(prepared, batches, strict=True):
        for name, image in zip(("image", "image_1"), each.scaled, strict=True):
            height, width = batch[f"{name}_size"][0]
            np.testing.assert_array_equal(image, batch[name][0, :height, :width])
    (folder / "images/val/2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image '.*/val/2\.jpg' is not a readable JPEG"):
        list(prediction_images(source, settings))


def write_map(path, values, mode="L"):
    PillowImage.fromarray(values).convert(mode).save(path)


BROKEN_MAPS = [
    (
        lambda path: write_map(path, np.zeros((40, 61), np.uint8)),
        "image '.*/images/train/0.jpg' has 40 x 60 pixels .*, but its map 40 x 61; make both the same size",
    ),
    (
        lambda path: write_map(path, np.full((40, 60), 3, np.uint8)),
        "map '.*/masks/train/0.png' has the value 3, but there are 3 classes, .*; check data.classes",
    ),
    (
        lambda path: write_map(path, np.zeros((40, 60), np.uint8), "RGB"),
        "map '.*/masks/train/0.png' is in RGB of 8 bits instead of index form",
    ),
    (
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        "map '.*/masks/train/0.png' is not a readable PNG; it may be truncated",
    ),
    (lambda path: path.unlink(), "map '.*/masks/train/0.png' does not exist"),
]


def test_maps_that_cannot_be_used_are_named(folder):
    data = SegmentationData(folder_config(folder))  # once, because tracing it takes seconds
    path = folder / "masks/train/0.png"
    for breaks, message in BROKEN_MAPS:
        write_map(path, np.zeros((40, 60), np.uint8))
        breaks(path)
        with pytest.raises(UserError, match=message) as caught:
            next(data.train_batches(0))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "digits"}, "data.source 'digits' has no maps; segmentation takes masks, ade20k"),
        ({"data.val_source": "folder"}, "data.val_source 'folder': segmentation takes its validation images"),
        ({"data.ratio_range": (2.0, 0.5)}, r"data.ratio_range \(2.0, 0.5\) must be two positive numbers"),
        ({"data.ratio_range": (1.0,)}, r"data.ratio_range \(1.0,\) must be two"),
        ({"data.eval_scales": ()}, r"data.eval_scales \(\) must be one or more positive numbers"),
        ({"data.eval_scales": (0.001,)}, "data.eval_short 50 times it is less than a pixel"),
        ({"model.in_chans": 4}, "model.in_chans 4: image files are read with 1 or 3"),
        ({"data.augment": "rand-m9-inc1"}, "but not their 'map'; set data.augment to distort"),
    ],
)
def test_user_errors(changes, message):
    values = config()
    with values.ignore_type():
        values.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        SegmentationData(values)


def test_other_tasks_see_images_without_labels():
    from cnx2_jax.data.images import ImageData

    data = ImageData(config())
    batch = next(data.train_batches(0))
    assert batch.keys() == {"image", "label"}
    assert not batch["label"].any() and data.class_names == ()
