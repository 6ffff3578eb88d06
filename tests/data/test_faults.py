"""Unreadable images: named and fatal, or skipped in a way that changes nothing else."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from cnx2_jax.data.images import ImageData
from cnx2_jax.data.order import shuffled_record
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults

COUNT = 20


def config(root, **changes):
    values = defaults("classify")
    values.update({"batch_size": 4, "image_size": (8, 8)})
    values.data.update({"root": str(root), "unreadable": "skip", "max_unreadable": 0.2, "flip": False})
    values.data.update({"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "eval_crop": 1.0, **changes})
    return values


@pytest.fixture
def folder(tmp_path):
    """20 images in two classes for training and validation each, every one of its own grey."""
    for split in ("train", "val"):
        for index in range(COUNT):
            path = tmp_path / split / "ab"[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (10 * index + 5,) * 3).save(path)
    return tmp_path


def damage(folder, split, *indices):
    for index in indices:
        path = folder / split / "ab"[index % 2] / f"{index:02}.png"
        kind = index % 3
        if kind == 0:
            path.write_bytes(b"")
        elif kind == 1:
            path.write_bytes(path.read_bytes()[:-30])
        else:
            path.unlink()  # after it was listed


def greys(batch):
    return batch["image"][:, 0, 0, 0].astype(int) // 10


def take(batches, count):
    return list(itertools.islice(batches, count))


# What the folder's records, sorted by class and name, are in the order of their greys.
GREY_OF = [*range(0, COUNT, 2), *range(1, COUNT, 2)]


def test_skipped_images_are_replaced_and_flagged(folder, capsys):
    data = ImageData(config(folder))
    whole = take(ImageData(config(folder)).train_batches(0), 10)
    damage(folder, "train", 3, 5, 16)
    batches = take(data.train_batches(0), 10)
    for before, after in zip(whole, batches, strict=True):
        bad = np.isin(greys(before), [3, 5, 16])
        np.testing.assert_array_equal(after["unreadable"], bad)
        np.testing.assert_array_equal(after["image"][~bad], before["image"][~bad])
        assert not np.isin(greys(after), [3, 5, 16]).any()
        np.testing.assert_array_equal(after["label"], greys(after) % 2)
        assert not before["unreadable"].any()
    assert sum(batch["unreadable"].sum() for batch in batches) == 6  # three in each of two epochs
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == [
        f"skipped: image '{folder}/train/{name}.png' cannot be read" for name in ("a/16", "b/03", "b/05")
    ]


def test_what_stands_in_is_that_record_at_the_same_place_of_a_later_epoch(folder):
    data = ImageData(config(folder))
    position = next(
        p for p in range(COUNT) if GREY_OF[int(shuffled_record(tf.constant(p, tf.int64), 20, 0))] == 3
    )
    damage(folder, "train", 3)
    later = int(shuffled_record(tf.constant(position + COUNT, tf.int64), COUNT, 0))
    expected = GREY_OF[later]
    assert expected != 3, "choose another record: this one comes twice at the same place"
    batch = take(data.train_batches(position // 4), 1)[0]
    assert greys(batch)[position % 4] == expected


def test_what_stands_in_depends_on_neither_hosts_nor_start(folder):
    data = ImageData(config(folder))
    damage(folder, "train", 3, 5, 16)
    whole = take(data.train_batches(0), 6)
    for step in (1, 4):
        (again,) = take(data.train_batches(step), 1)
        shards = [next(data.train_batches(step, process_index=i, process_count=2)) for i in range(2)]
        for key in ("image", "label", "unreadable"):
            np.testing.assert_array_equal(again[key], whole[step][key])
            np.testing.assert_array_equal(np.concatenate([s[key] for s in shards]), whole[step][key])


def test_unreadable_val_images_count_for_nothing(folder):
    data = ImageData(config(folder))
    damage(folder, "val", 3, 5, 16)
    for hosts in (1, 2):
        counted, unreadable = [], 0
        for host in range(hosts):
            for batch in data.eval_batches(process_index=host, process_count=hosts):
                counted += greys(batch)[batch["mask"]].tolist()
                unreadable += batch["unreadable"].sum()
                assert not (batch["mask"] & batch["unreadable"]).any()
        assert unreadable == 3
        assert sorted(counted) == [i for i in range(COUNT) if i not in (3, 5, 16)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_more_than_the_share_is_fatal(folder, split):
    data = ImageData(config(folder, max_unreadable=0.1))
    damage(folder, split, 1, 2)
    batches = data.train_batches(0) if split == "train" else data.eval_batches()
    take(batches, 20)  # two of twenty are a tenth, however often they come
    damage(folder, split, 9)
    batches = data.train_batches(0) if split == "train" else data.eval_batches()
    with pytest.raises(UserError, match=r"3 of 20 images cannot be read, the last '.*': more than .*0\.1"):
        take(batches, 20)


def test_all_unreadable_is_an_error_that_names_one(folder):
    data = ImageData(config(folder, max_unreadable=0.5))
    damage(folder, "train", *range(COUNT))
    with pytest.raises(UserError, match=re.escape(str(folder / "train"))):
        take(data.train_batches(0), 5)


def test_unknown_policy(folder):
    with pytest.raises(UserError, match=r"unknown data\.unreadable 'skp'; did you mean 'skip'"):
        ImageData(config(folder, unreadable="skp"))
