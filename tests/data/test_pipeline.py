"""The pipeline: a batch is a function of (seed, step), whoever asks for it; evaluation counts once."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnx2_jax.data import pipeline
from cnx2_jax.data.images import ImageData, preprocess_files
from cnx2_jax.data.order import epoch_order, shuffled_record
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults


def config(root="", source="folder", **changes):
    values = defaults("classify")
    values.update({"batch_size": 12, "image_size": (16, 16)})
    values.data.update(
        {"source": source, "root": str(root), "val_fraction": 0.2, "crop_scale": (0.3, 1.0), "eval_crop": 1.0}
    )
    values.update_from_flattened_dict(changes)
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 training and 10 validation images in two classes, each of one colour that tells which."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 23), ("val", 10)):
        for index in range(count):
            kind = ("jpg", "png", "webp")[index % 3]
            path = root / split / ("even", "odd")[index % 2] / f"{index:02}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + index, 30), (10 * index, 10 * index, 10 * index)).save(path)
    return root


@pytest.fixture(scope="module")
def textured(tmp_path_factory):
    """Nine images of noise, so that two crops are never equal."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for index in range(9):
        noise = rng.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{index}.png")
    return root


def identity(batch) -> list[int]:
    """Which images of `folder` a batch holds, told by their colour."""
    return np.round(batch["image"].mean(axis=(1, 2, 3)) / 10).astype(int).tolist()


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def orders(num_records, seed, *, first=0, count=1) -> np.ndarray:
    """The records of `count` epochs from `first` on, [count, num_records]."""
    positions = tf.data.Dataset.range(first * num_records, (first + count) * num_records)
    records = positions.map(lambda position: shuffled_record(position, num_records, seed))
    return next(records.batch(count * num_records).as_numpy_iterator()).reshape(count, num_records)


@settings(max_examples=15, deadline=None)
@given(
    num_records=st.integers(1, 300),
    first=st.integers(0, 10**7),
    seed=st.integers(-(2**31), 2**31 - 1),
)
def test_every_epoch_is_a_permutation(num_records, first, seed):
    for order in orders(num_records, seed, first=first, count=2):
        assert sorted(order) == list(range(num_records))


def test_epoch_order_is_that_of_the_stream():
    for epoch, order in enumerate(orders(50, 3, count=4)):
        np.testing.assert_array_equal(epoch_order(epoch, 50, 3), order)


def test_order_is_new_in_every_epoch_and_for_every_seed():
    # Of 30! orders not one should come twice. Keys that are not hashed give 256 in all.
    drawn = [order.tobytes() for seed in (0, 1, 256) for order in orders(30, seed, count=300)]
    assert len(set(drawn)) == 900


def test_every_record_is_as_likely_anywhere_and_after_any_other():
    num_records, epochs = 40, 2000
    drawn = orders(num_records, 0, count=epochs)
    places = np.stack([np.bincount(column, minlength=num_records) for column in drawn.T])
    gaps = np.bincount((np.diff(drawn, axis=1) % num_records).ravel(), minlength=num_records)[1:]
    for counts in (places, gaps):
        expected = counts.mean()
        chi_square = ((counts - expected) ** 2 / expected).mean()
        # A mean of terms of mean 1 and variance 2: four standard deviations.
        assert chi_square < 1 + 4 * np.sqrt(2 / counts.size)


def test_batches_have_the_promised_form_and_the_right_labels(folder):
    data = ImageData(config(folder))
    assert (data.num_train, data.num_val, data.class_names) == (23, 10, ("even", "odd"))
    for batch in take(data.train_batches(0), 3):
        assert batch["image"].shape == (12, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (12,) and batch["label"].dtype == np.int32
        assert [index % 2 for index in identity(batch)] == batch["label"].tolist()


def test_epochs_follow_one_another_without_partial_batches(folder):
    batches = take(ImageData(config(folder)).train_batches(0), 23)  # 12 epochs of 23 records
    stream = [index for batch in batches for index in identity(batch)]
    epochs = [stream[i : i + 23] for i in range(0, len(stream), 23)]
    assert len(epochs) == 12
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_one_image_is_augmented_anew_each_time_it_comes(textured):
    # One record, so that every image of the stream is another crop of the same.
    data = ImageData(config(textured, **{"data.train_per_class": 1, "data.val_fraction": 0.0}))
    images = np.concatenate([batch["image"] for batch in take(data.train_batches(0), 4)])
    assert len({image.tobytes() for image in images}) == 48


EVERYTHING = {"data.augment": "rand-m9-mstd0.5-inc1", "data.random_erasing": 0.5}


def test_the_whole_recipe_depends_on_nothing_but_seed_and_position(textured):
    data = ImageData(config(textured, **EVERYTHING))
    whole = take(data.train_batches(0), 8)
    assert_equal(take(data.train_batches(6), 2), whole[6:])
    shards = [take(data.train_batches(6, process_index=i, process_count=2), 2) for i in range(2)]
    for number, batch in enumerate(whole[6:]):
        joined = np.concatenate([shard[number]["image"] for shard in shards])
        np.testing.assert_array_equal(joined, batch["image"])
    plain = take(ImageData(config(textured)).train_batches(0), 1)[0]
    assert (plain["image"] != whole[0]["image"]).any()


@settings(max_examples=4, deadline=None)
@given(step=st.integers(0, 50), seed=st.integers(-5, 5))
def test_starting_at_a_step_equals_skipping_to_it(textured, step, seed):
    data = ImageData(config(textured, seed=seed))
    skipped = itertools.islice(data.train_batches(0), step, step + 2)
    assert_equal(take(data.train_batches(step), 2), skipped)


@settings(max_examples=3, deadline=None)
@given(step=st.integers(0, 10**9), hosts=st.sampled_from([2, 4, 8]))
def test_hosts_partition_the_global_batch(textured, step, hosts):
    data = ImageData(config(textured, batch_size=16))
    whole = take(data.train_batches(step), 2)
    shards = [take(data.train_batches(step, process_index=i, process_count=hosts), 2) for i in range(hosts)]
    for number, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([shard[number][key] for shard in shards])
            np.testing.assert_array_equal(batch[key], joined)


def test_threads_do_not_matter(tmp_path, monkeypatch):
    # Large and small in turn, so that threads finish in another order than they start.
    for index in range(16):
        side = (900, 20)[index % 2]
        Image.effect_noise((side, side), 50).save(tmp_path / f"{index}.png")
    data = ImageData(config(tmp_path, **{"data.val_fraction": 0.0}))
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 1)
    expected = take(data.train_batches(5), 4)
    monkeypatch.setattr(pipeline, "usable_cores", lambda: 8)
    assert_equal(take(data.train_batches(5), 4), expected)


def test_seed_changes_the_batches(textured):
    first, second = (next(ImageData(config(textured, seed=s)).train_batches(0)) for s in (0, 1))
    assert (first["image"] != second["image"]).any()


def test_digits_in_one_channel_and_a_rectangle():
    data = ImageData(config(source="digits", image_size=(16, 24), **{"model.in_chans": 1}))
    assert (data.num_train, data.num_val) == (1438, 359)
    assert data.class_names == tuple("0123456789")
    assert next(data.train_batches(10**6))["image"].shape == (12, 16, 24, 1)
    assert next(data.eval_batches())["image"].shape == (12, 16, 24, 1)


# 10 images: a last batch of one, which a host has or has not, and batches larger than the set.
@pytest.mark.parametrize(("batch_size", "hosts"), [(6, 1), (12, 1), (3, 3), (9, 3), (30, 3)])
def test_evaluation_counts_every_image_once(folder, hosts, batch_size):
    data = ImageData(config(folder, batch_size=batch_size))
    shards = [list(data.eval_batches(process_index=i, process_count=hosts)) for i in range(hosts)]
    assert {len(shard) for shard in shards} == {-(-10 // batch_size)}
    counted = []
    for batch in itertools.chain(*shards):
        assert len(batch["image"]) == len(batch["label"]) == len(batch["mask"]) == batch_size // hosts
        assert batch["mask"].dtype == np.bool_
        counted += [i for i, real in zip(identity(batch), batch["mask"], strict=True) if real]
    assert sorted(counted) == list(range(10))


def test_evaluation_uses_the_configs_batch_and_no_chance(folder):
    data = ImageData(config(folder))
    batches = list(data.eval_batches())
    assert [len(batch["mask"]) for batch in batches] == [12]
    assert_equal(data.eval_batches(), batches)
    first = folder / "val" / "even" / "00.jpg"
    expected = preprocess_files([first], config())
    np.testing.assert_array_equal(batches[0]["image"][0], expected[0])


def test_no_val_images_no_batches(textured):
    data = ImageData(config(textured, **{"data.val_fraction": 0.0}))
    assert data.num_val == 0
    assert list(data.eval_batches()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(b"not an image"),
            "is not a readable JPEG, PNG or WebP image",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is not a readable JPEG"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_bad_image_is_named_at_its_batch(tmp_path, damage, message):
    for index in range(9):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / f"{index}.png")
    settings = config(tmp_path, batch_size=2, **{"data.val_fraction": 0.0})
    data = ImageData(settings)
    bad = int(shuffled_record(tf.constant(5, tf.int64), 9, 0))  # position 5 is in batch 2
    damage(tmp_path / f"{bad}.png")
    batches = data.train_batches(0)
    assert len(take(batches, 2)) == 2
    named = re.escape(str(tmp_path / f"{bad}.png"))
    with pytest.raises(UserError, match=f"'{named}' {message}") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_bad_val_image_is_named(tmp_path):
    for name in ("train/a/1.png", "val/a/1.png", "val/a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    bad = tmp_path / "val/a/2.png"
    bad.write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(str(bad))):
        list(ImageData(config(tmp_path)).eval_batches())


def test_errors_whose_text_is_no_text(tmp_path):
    strange = tmp_path / b"\xff.png".decode("utf-8", "surrogateescape")
    for path in (tmp_path / "fine.png", strange):
        Image.new("RGB", (20, 20)).save(path, "PNG")
    data = ImageData(config(tmp_path, batch_size=2, **{"data.val_fraction": 0.0}))
    strange.unlink()
    with pytest.raises(UserError, match=r"does not exist|is not a readable"):
        next(data.train_batches(0))
    with pytest.raises(UserError, match=r"does not exist|is not a readable"):
        preprocess_files([strange], config())


def test_whole_numbers_as_mean_and_deviation(textured):
    plain = {"data.mean": (0, 0, 0), "data.std": (1, 1, 1)}
    assert next(ImageData(config(textured, **EVERYTHING, **plain)).train_batches(0))["image"].any()


def test_failure_that_does_not_repeat_is_not_blamed_on_an_image(textured):
    failed = []

    def fail_once(index):
        if not failed:
            failed.append(True)
            raise OSError("disk full")
        return index

    data = ImageData(config(textured))
    source = data.train

    def read(index):
        index = tf.numpy_function(fail_once, [index], tf.int64)
        return source.read(tf.ensure_shape(index, []))

    data.train = dataclasses.replace(source, read=read)
    with pytest.raises(tf.errors.OpError, match="disk full"):
        next(data.train_batches(0))


@pytest.mark.parametrize("batches", ["train", "eval"])
def test_batch_that_does_not_divide_over_hosts(textured, batches):
    data = ImageData(config(textured))
    with pytest.raises(UserError, match="batch_size 12 does not divide over 5 hosts"):
        if batches == "train":
            data.train_batches(0, process_count=5)
        else:
            next(data.eval_batches(process_count=5))


def test_val_images_from_elsewhere(folder, tmp_path):
    for name in ("odd", "even"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (20, 20), (70, 70, 70)).save(tmp_path / "odd" / "1.png")
    elsewhere = {"data.val_source": "folder", "data.val_root": str(tmp_path)}
    data = ImageData(config(folder, **elsewhere))
    (batch,) = data.eval_batches()
    assert data.num_val == 1 and batch["label"][0] == 1 and identity(batch)[0] == 7
    with pytest.raises(UserError, match=r"without data\.val_source"):
        ImageData(config(folder, **{"data.val_root": str(tmp_path)}))
    (tmp_path / "neither").mkdir()
    (tmp_path / "neither" / "2.png").write_bytes((tmp_path / "odd" / "1.png").read_bytes())
    with pytest.raises(UserError, match="a class 'neither' that the model was not trained on"):
        ImageData(config(folder, **elsewhere))


def test_channels_that_files_do_not_have(textured):
    with pytest.raises(UserError, match=r"model\.in_chans 4"):
        ImageData(config(textured, **{"model.in_chans": 4}))


def test_preprocess_files_keeps_the_order(folder):
    paths = [folder / "val" / "odd" / "03.jpg", str(folder / "val" / "even" / "02.webp")]
    options = {"image_size": (8, 12), "data.eval_crop": 0.875}
    images = preprocess_files(paths, config(**options))
    assert images.shape == (2, 8, 12, 3) and images.dtype == np.uint8
    assert identity({"image": images}) == [3, 2]
    assert preprocess_files(paths, config(**options, **{"model.in_chans": 1})).shape == (2, 8, 12, 1)


def test_preprocess_files_names_the_bad_one(folder, tmp_path):
    good, bad, missing = folder / "val" / "odd" / "03.jpg", tmp_path / "b.jpg", tmp_path / "no.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(UserError, match=f"'{re.escape(str(bad))}' is not a readable"):
        preprocess_files([good, bad], config())
    with pytest.raises(UserError, match=f"'{re.escape(str(missing))}' does not exist"):
        preprocess_files([good, missing], config())


def test_tensorflow_sees_no_accelerator():
    assert tf.config.get_visible_devices("GPU") == []
