"""Sources: what is found in folders, how it is labelled, and which records are held out."""

import collections
import hashlib
import io

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.data.sources import Source, open_source
from cnx2_jax.errors import UserError


def config(source="folder", root="", **changes):
    defaults = {"source": source, "root": str(root), "val_fraction": 0.25, "train_per_class": 0}
    return ConfigDict({**defaults, **changes})


def make(folder, *names):
    """Writes a file under each name, holding its own name: sources do not look inside."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def records(source: Source) -> list[tuple[bytes, int]]:
    read = [source.read(tf.constant(i, tf.int64)) for i in range(source.num_records)]
    return [(record["bytes"].numpy(), int(record["label"])) for record in read]


def names(source: Source) -> set[str]:
    return {source.describe(i) for i in range(source.num_records)}


def test_digits_are_scikit_learns_and_each_is_in_one_split():
    digits = load_digits()
    expected = collections.Counter(
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), label)
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    found = collections.Counter()
    for split in ("train", "val"):
        source = open_source(config("digits"), split, seed=0)
        assert source.class_names == tuple("0123456789")
        for encoded, label in records(source):
            image = np.asarray(Image.open(io.BytesIO(encoded)))
            assert image.shape == (8, 8)
            found[image.tobytes(), label] += 1
    assert found == expected


def test_digits_split_is_stratified_and_fixed():
    train, val = (open_source(config("digits"), split, seed=0) for split in ("train", "val"))
    assert (train.num_records, val.num_records) == (1438, 359)
    counts = collections.Counter(label for _, label in records(val))
    totals = collections.Counter(load_digits().target.tolist())
    assert all(abs(counts[label] - 0.2 * totals[label]) <= 0.5 for label in range(10))
    # Results are compared between runs and versions: these must never change.
    listed = " ".join(val.describe(i) for i in range(359))
    assert listed.startswith("digits/3 digits/7 digits/9 digits/11 digits/12 ")
    assert hashlib.sha256(listed.encode()).hexdigest().startswith("b591e3df6d687736")
    assert names(open_source(config("digits", val_fraction=0.5), "val", seed=9)) == names(val)


def test_train_per_class_keeps_that_many_by_seed_and_leaves_val():
    def opened(split, seed, per_class):
        return open_source(config("digits", train_per_class=per_class), split, seed)

    few = opened("train", 0, 10)
    counts = collections.Counter(label for _, label in records(few))
    assert counts == dict.fromkeys(range(10), 10)
    assert names(few) < names(opened("train", 0, 0))
    assert names(few) == names(opened("train", 0, 10))
    assert names(few) != names(opened("train", 1, 10))
    assert opened("val", 0, 10).num_records == opened("val", 0, 0).num_records
    assert opened("train", -3, 10**6).num_records == opened("train", 0, 0).num_records


def test_train_and_val_folders_of_classes(tmp_path):
    make(
        tmp_path,
        "train/dog/b.JPG",
        "train/dog/deep/er/a.webp",
        "train/cat/x.Png",
        "train/ox/y.jpeg",
    )
    make(tmp_path, "val/ox/1.png", "val/cat/2.png", "test/ignored/3.png")
    make(tmp_path, "train/dog/.hidden.jpg", "train/dog/notes.txt", "train/.cache/z.png")
    train, val = (open_source(config(root=tmp_path), split, seed=0) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("cat", "dog", "ox")
    assert records(train) == [
        (b"train/cat/x.Png", 0),
        (b"train/dog/b.JPG", 1),
        (b"train/dog/deep/er/a.webp", 1),
        (b"train/ox/y.jpeg", 2),
    ]
    assert records(val) == [(b"val/cat/2.png", 0), (b"val/ox/1.png", 2)]
    assert train.describe(1) == str(tmp_path / "train/dog/b.JPG")


@pytest.mark.parametrize("base", ["", "train/"])
def test_split_of_one_folder_is_stratified_and_complete(tmp_path, base):
    sizes = {"a": 40, "b": 2, "c": 1, "d": 7}
    everything = [f"{base}{c}/{i}.jpg" for c, size in sizes.items() for i in range(size)]
    make(tmp_path, *everything)
    train, val = (open_source(config(root=tmp_path), split, seed=0) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("a", "b", "c", "d")
    assert sorted(value for value, _ in records(train) + records(val)) == sorted(
        name.encode() for name in everything
    )
    counts = collections.Counter(label for _, label in records(val))
    assert counts == {0: 10, 1: 1, 3: 2}  # a quarter, at least one, but never all of a class
    none = open_source(config(root=tmp_path, val_fraction=0.0), "val", seed=0)
    assert none.num_records == 0


def test_split_depends_on_names_alone(tmp_path):
    files = [f"{c}/{i}.png" for c in "ab" for i in range(20)]
    make(tmp_path / "one", *files)
    make(tmp_path / "elsewhere/two", *reversed(files))

    def val(root, seed):
        return {value for value, _ in records(open_source(config(root=root), "val", seed))}

    first = val(tmp_path / "one", 0)
    assert len(first) == 10
    assert val(tmp_path / "one", 7) == first
    assert val(f"{tmp_path}/one/", 0) == first
    assert val(tmp_path / "elsewhere/two", 0) == first
    make(tmp_path / "one", "a/new.png")
    assert len(val(tmp_path / "one", 0) ^ first) <= 2


def test_images_without_class_folders_are_unlabelled(tmp_path):
    make(tmp_path, *(f"{i}.jpg" for i in range(8)))
    train, val = (open_source(config(root=tmp_path), split, seed=0) for split in ("train", "val"))
    assert train.class_names == val.class_names == ()
    assert (train.num_records, val.num_records) == (6, 2)
    assert {label for _, label in records(train) + records(val)} == {0}
    assert open_source(config(root=tmp_path, train_per_class=3), "train", seed=0).num_records == 3


def test_names_beyond_ascii_and_utf8(tmp_path):
    make(tmp_path, "猫/ä b.png")
    strange = tmp_path / "猫" / b"\xff.png".decode("utf-8", "surrogateescape")
    strange.write_bytes(b"strange")
    source = open_source(config(root=tmp_path, val_fraction=0.0), "train", seed=0)
    assert source.class_names == ("猫",)
    assert {value for value, _ in records(source)} == {"猫/ä b.png".encode(), b"strange"}
    assert names(source) == {str(tmp_path / "猫/ä b.png"), str(strange)}


def test_home_is_expanded(tmp_path, monkeypatch):
    make(tmp_path, "pictures/a/1.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source(config(root="~/pictures"), "train", seed=0).num_records == 1


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ([], {"source": "digit"}, "unknown data.source 'digit'; did you mean 'digits'"),
        ([], {"root": ""}, "data.root is not set"),
        ([], {"root": "/no/such"}, "data.root '/no/such' is not a folder"),
        ([], {}, "no images .* in '{root}'"),
        (["notes.txt"], {}, "no images .* in '{root}'"),
        (["train/a/1.png", "val/a/notes.txt"], {}, "no images .* in '{root}/val'"),
        (["val/a/1.png"], {}, "'{root}' has a folder 'val' but no 'train'"),
        (["train/a/1.png", "val/b/1.png"], {}, "class 'b' is only in '{root}/val'"),
        (["train/a/1.png", "val/1.png"], {}, "image '{root}/val/1.png' lies beside"),
        (["train/1.png", "val/a/1.png"], {}, "class 'a' is only in '{root}/val'"),
        (["a/1.png", "stray.png"], {}, "image '{root}/stray.png' lies beside"),
        (["a/1.png", "b/1.gif"], {}, "class folder '{root}/b' has no images"),
        (["a/1.png"], {"val_fraction": 1.0}, r"data.val_fraction 1.0 is not in \[0, 1\)"),
        (["a/1.png"], {"train_per_class": -1}, "data.train_per_class -1 is negative"),
    ],
)
def test_user_errors(tmp_path, files, changes, message):
    make(tmp_path, *files)
    with pytest.raises(UserError, match=message.format(root=tmp_path)) as caught:
        for split in ("train", "val"):
            open_source(config(**{"root": str(tmp_path), **changes}), split, seed=0)
    assert "\n" not in str(caught.value)


def test_unlistable_folder_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=f"cannot list '{tmp_path}': Permission denied"):
        open_source(config(root=tmp_path), "train", seed=0)
