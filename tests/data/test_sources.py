"""Sources: what is found in folders, how it is labelled, and which records are held out."""

import collections
import dataclasses
import hashlib
import io

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.data.sources import Source, open_set, open_source
from cnx2_jax.data.sources.folder import open_files
from cnx2_jax.data.tensorflow import tf
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
    return [(record["image"].numpy(), int(record["label"])) for record in read]


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


def test_files_and_folders_of_files_keep_their_order(tmp_path):
    make(
        tmp_path, "b/2.png", "b/deep/er/1.webp", "b/10.JPG", "b/.hidden.png", "b/notes.txt", "a/3.png", "own"
    )
    given = [str(tmp_path / name) for name in ("own", "b", "a/3.png", "own")]
    source = open_files(given)
    expected = ["own", "b/10.JPG", "b/2.png", "b/deep/er/1.webp", "a/3.png", "own"]
    assert records(source) == [(name.encode(), 0) for name in expected]
    assert [source.describe(i) for i in range(6)] == [str(tmp_path / name) for name in expected]
    assert source.class_names == ()


def test_files_that_are_not_there(tmp_path):
    make(tmp_path, "a.png", "text/notes.txt")
    with pytest.raises(UserError, match=r"image '.*/none.png' does not exist"):
        open_files([str(tmp_path / "a.png"), str(tmp_path / "none.png")])
    with pytest.raises(UserError, match=r"no images .* in '.*/text'"):
        open_files([str(tmp_path / "text")])


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
        ([], {"source": "folder:x"}, "unknown data.source 'folder:x'"),
        ([], {"source": "synthetic:ten"}, "'synthetic:ten' must be synthetic"),
        ([], {"source": "synthetic:10:11"}, "no more classes than records"),
        ([], {"source": "synthetic:0"}, "'synthetic:0' must be synthetic"),
        ([], {"source": "synthetic:9999999999"}, "fewer than a billion records"),
        ([], {"source": "synthetic::5"}, "'synthetic::5' must be synthetic"),
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


def test_links_in_a_circle_are_named(tmp_path):
    make(tmp_path, "images/a/1.png")
    (tmp_path / "images" / "a" / "loop").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"cannot list '.*loop.*': Too many levels of symbolic links"):
        open_source(config(root=tmp_path / "images"), "train", seed=0)
    (tmp_path / "images" / "a" / "loop").unlink()
    (tmp_path / "images" / "a" / "self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"cannot list '.*': Too many levels of symbolic links"):
        open_source(config(root=tmp_path / "images"), "train", seed=0)


def test_unlistable_folder_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=f"cannot list '{tmp_path}': Permission denied"):
        open_source(config(root=tmp_path), "train", seed=0)


def test_synthetic_images_are_of_one_size_and_all_classes():
    train, val = (open_source(config("synthetic:100:4"), split, seed=0) for split in ("train", "val"))
    assert (train.num_records, val.num_records) == (100, 4)
    assert train.class_names == val.class_names == ("0", "1", "2", "3")
    contents = [content for content, _ in records(train)]
    assert len(set(contents)) == 32 and not set(contents) & {content for content, _ in records(val)}
    assert {Image.open(io.BytesIO(content)).size for content in contents} == {(500, 375)}
    assert all(60_000 < len(content) < 130_000 for content in contents)  # as photographs are
    assert [label for _, label in records(train)] == train.labels.tolist() == [0, 1, 2, 3] * 25
    like_imagenet = open_source(config("synthetic"), "train", seed=0)
    assert (like_imagenet.num_records, len(like_imagenet.class_names)) == (1_281_167, 1000)
    few = open_source(config("synthetic:100:4", train_per_class=3), "train", seed=0)
    assert collections.Counter(label for _, label in records(few)) == dict.fromkeys(range(4), 3)


def test_a_set_is_labelled_by_the_models_classes(tmp_path):
    make(tmp_path, "a/dog/1.png", "a/ant/2.png", "numbers/0/3.png", "numbers/10/4.png", "numbers/2/5.png")
    names = ("ant", "bee", "cat", "dog", *(f"class {i}" for i in range(4, 11)))
    named = open_set("folder", str(tmp_path / "a"), names, None)
    assert records(named) == [(b"a/ant/2.png", 0), (b"a/dog/1.png", 3)]
    assert named.class_names == names and named.labels.tolist() == [0, 3]
    # ImageNet-V2 names its folders by place in the list of classes.
    numbered = open_set("folder", str(tmp_path / "numbers"), names, None)
    assert {(content[-5:-4], label) for content, label in records(numbered)} == {
        (b"3", 0),
        (b"4", 10),
        (b"5", 2),
    }
    with pytest.raises(UserError, match="a class '10' that the model was not trained on"):
        open_set("folder", str(tmp_path / "numbers"), names[:5], None)
    # Numbers that are names are names.
    assert open_set("folder", str(tmp_path / "numbers"), ("10", "2", "0"), None).labels.tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="a class '0' that the model was not trained on"):
        open_set("folder", str(tmp_path / "numbers"), ("10", "2", "5"), None)
    with pytest.raises(UserError, match=r"numbers/0' has no class folders"):
        open_set("folder", str(tmp_path / "numbers" / "0"), names, None)
    with pytest.raises(UserError, match="a class 'dog' that"):
        open_set("folder", str(tmp_path / "a"), ("ant",), None)
    with pytest.raises(UserError, match=r"data\.val_root is not set"):
        open_set("folder", "", names, None)
    with pytest.raises(UserError, match=r"unknown data\.val_source 'folders'; did you mean 'folder'"):
        open_set("folders", "", names, None)


def test_labels_are_read_where_they_are_not_known(tmp_path):
    make(tmp_path, "train/a/1.png", "train/b/1.png", "train/b/2.png")
    source = open_source(config(root=tmp_path, val_fraction=0), "train", seed=0)
    unknown = dataclasses.replace(source, labels=None)
    for labels in (source.all_labels(), unknown.all_labels()):
        assert labels.tolist() == [0, 1, 1]
        assert labels.dtype == np.int32


def test_rows_of_digits_hold_the_set_and_the_sum_of_their_digits():
    source = open_source(config("digit_rows"), "val", seed=0)
    again = open_source(config("digit_rows"), "val", seed=1)
    assert source.num_records == 400 and source.class_names == tuple("0123456789")
    for index in range(20):
        record, other = source.read(np.int64(index)), again.read(np.int64(index))
        assert bytes(record["image"].numpy()) == bytes(other["image"].numpy())
        found, total = set(record["labels"].numpy().tolist()), float(record["value"][0])
        assert 1 <= len(found) <= 3 and sum(found) <= total <= 27
        np.testing.assert_array_equal(np.flatnonzero(source.targets["labels"][index]), sorted(found))
        assert source.targets["value"][index, 0] == total
    few = source.only(np.arange(400) < 3)
    assert few.targets["value"].shape == (3, 1)
