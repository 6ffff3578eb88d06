"""Tables of labels: what is read, which images each split has, and every mistake by file and line."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cnx2_jax.data import csv_labels
from cnx2_jax.data.sources import open_source
from cnx2_jax.data.sources.labelled import open_labelled
from cnx2_jax.errors import UserError

WANTED = {"label": "label", "labels": "labels", "value": "age"}


@pytest.fixture
def files(tmp_path):
    """A function that writes images, a table and a file of class names, and returns `config.data`."""

    def write(table, images=("a.png", "b.png", "sub/c.png"), classes="", targets=("age",), **values):
        for name in images:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), len(name)).save(path)
        (tmp_path / "labels.csv").write_bytes(table.encode() if isinstance(table, str) else table)
        if classes:
            (tmp_path / "names.txt").write_text(classes)
            classes = str(tmp_path / "names.txt")
        data = {"source": "folder", "root": str(tmp_path / "images"), "val_fraction": 0.0}
        data |= {"labels": str(tmp_path / "labels.csv"), "classes": classes, "targets": targets}
        return ConfigDict({**data, "train_per_class": 0, **values})

    return write


def decoded(source, name):
    field = source.fields[name]
    entries = (source.read(np.int64(index))[name] for index in range(source.num_records))
    return [np.asarray(field.decode(entry)) for entry in entries]


def names(source):
    return [source.describe(index).rsplit("images/", 1)[1] for index in range(source.num_records)]


def test_labels_in_one_cell_in_any_order_of_rows(files):
    data = files("image,labels\nsub/c.png, cat ; dog\na.png,\n\nb.png,newt\n")
    source = open_labelled(data, "train", "labels")
    assert names(source) == ["a.png", "b.png", "sub/c.png"]
    assert source.class_names == ("cat", "dog", "newt")
    expected = [[0, 0, 0], [0, 0, 1], [1, 1, 0]]
    np.testing.assert_array_equal(decoded(source, "labels"), expected)
    np.testing.assert_array_equal(source.targets["labels"], expected)
    assert decoded(source, "labels")[0].dtype == np.float32
    assert source.labels is None


def test_arrays_have_labels_too(files, tmp_path):
    data = files(
        "image,age\na.npy,3\nb.npy,5\n", images=(), source="arrays", layout="channels_last", array=""
    )
    (tmp_path / "images").mkdir()
    for index, name in enumerate("ab"):
        np.save(tmp_path / "images" / f"{name}.npy", np.full((2, 3, 5), 300 + index, np.uint16))
    source = open_labelled(data, "train", "value")
    assert source.fields["image"].form.bands == 5
    np.testing.assert_array_equal(decoded(source, "value"), [[3], [5]])


def test_a_file_of_names_decides_their_order(files):
    source = open_labelled(
        files("image,labels\na.png,cat\nb.png,\nsub/c.png,dog\n", classes="ox\ndog\ncat\n"), "train", "labels"
    )
    assert source.class_names == ("ox", "dog", "cat")
    np.testing.assert_array_equal(decoded(source, "labels"), [[0, 0, 1], [0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("classes", ["", "dog\n"])
def test_a_column_of_0_and_1_per_class(files, classes):
    data = files(
        "dog,image,split,cat\n1,a.png,train,0\n0,b.png,train,1\n1,sub/c.png,val,1\n", classes=classes
    )
    source = open_labelled(data, "train", "labels")
    assert source.class_names == (("dog",) if classes else ("dog", "cat"))
    np.testing.assert_array_equal(decoded(source, "labels"), [[1], [0]] if classes else [[1, 0], [0, 1]])
    assert names(open_labelled(data, "val", "labels")) == ["sub/c.png"]


def test_one_label_and_values(files):
    data = files('image,label,age,mass\na.png,dog,1.5,2\nb.png,cat,-3,1e2\nsub/c.png,dog,"4",0\n')
    source = open_labelled(data, "train", "label")
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]
    assert [int(label) for label in decoded(source, "label")] == [1, 0, 1]
    data.targets = ("mass", "age")
    source = open_labelled(data, "train", "value")
    assert source.class_names == ("mass", "age")
    np.testing.assert_array_equal(decoded(source, "value"), [[2, 1.5], [100, -3], [0, 4]])
    np.testing.assert_array_equal(source.targets["value"], [[2, 1.5], [100, -3], [0, 4]])


def test_a_byte_order_mark_and_lines_of_windows(files):
    data = files("\ufeffimage,age\r\na.png,1\r\nb.png,2\r\nsub/c.png,3\r\n")
    assert open_labelled(data, "train", "value").num_records == 3


def test_without_a_column_split_folders_or_a_share_are_held_out(files):
    paths = [f"{split}/{index}.png" for split in ("train", "val") for index in range(3)]
    rows = "".join(f"{path},{index}\n" for index, path in enumerate(paths))
    data = files(f"image,age\n{rows}", paths, val_fraction=0.4)
    assert names(open_labelled(data, "val", "value")) == paths[3:]
    data = files(f"image,age\n{rows}x.png,7\n", ["x.png"], val_fraction=0.4)
    train, val = (names(open_labelled(data, split, "value")) for split in ("train", "val"))
    assert len(val) == 3 and sorted(train + val) == sorted([*paths, "x.png"])


@pytest.mark.parametrize(
    ("wanted", "table", "message"),
    [
        (
            "labels",
            "image;labels\na.png;x\n",
            "the columns of '{csv}' are separated by ';'; separate them by",
        ),
        ("labels", "image\tlabels\na.png\tx\n", "are separated by tabs; separate them by commas"),
        ("labels", "file,labels\na.png,x\n", "has no column 'image' (its columns: file, labels); add it"),
        ("labels", "", "'{csv}' has no rows; write the names of the columns"),
        ("labels", "image,labels\n", "'{csv}' has no rows"),
        ("labels", "image,x,x\na.png,1,1\n", "'{csv}' has two columns 'x'; rename one"),
        ("labels", "image,labels\na.png,x,y\n", "line 2 of '{csv}' has 3 cells for 2 columns; quote cells"),
        ("labels", 'image,labels\na.png,"x\n', "line 2 of data.labels '{csv}' is not valid CSV"),
        ("labels", b"image,labels\na.png,\xff\n", "'{csv}' is not UTF-8 text"),
        ("labels", "image\na.png\nb.png\nsub/c.png\n", "'{csv}' has no labels: add a column 'labels'"),
        ("labels", "image,labels\na.png,\nb.png,\nsub/c.png,\n", "no row of '{csv}' has a label"),
        ("labels", "image,labels\na.png,x\nb.png,\n", "image 'sub/c.png' has no row in '{csv}'; add one"),
        (
            "labels",
            "image,labels\na.png,x\n\nz.png,\n",
            "line 4 of '{csv}' names image 'z.png', which is not",
        ),
        (
            "labels",
            "image,labels\na.png,x\na.png,x\n",
            "image 'a.png' is on lines 2 and 3 of '{csv}'; remove",
        ),
        ("labels", "image,labels\na.png,x;;y\nb.png,\nsub/c.png,\n", "line 2 of '{csv}': a class is empty"),
        (
            "labels",
            "image,labels\na.png,x;x\nb.png,\nsub/c.png,\n",
            "line 2 of '{csv}' names class 'x' twice",
        ),
        (
            "labels",
            "image,x\na.png,1\nb.png,0\nsub/c.png,2\n",
            "line 4 of '{csv}': column 'x' holds '2', not 0",
        ),
        (
            "labels",
            "image,labels,split\na.png,x,val\nb.png,,test\nsub/c.png,,val\n",
            "line 3 of '{csv}': split 'test' must be train or val",
        ),
        ("labels", "image,labels,split\na.png,x,val\nb.png,,val\nsub/c.png,,val\n", "are for validation"),
        (
            "label",
            "image,labels\na.png,x\nb.png,x\nsub/c.png,x\n",
            "has no column 'label'; did you mean 'labels'",
        ),
        ("label", "image,label\na.png,x\nb.png,\nsub/c.png,x\n", "line 3 of '{csv}': a class is empty"),
        (
            "value",
            "image,age\na.png,1\nb.png,x\nsub/c.png,3\n",
            "line 3 of '{csv}': column 'age' holds 'x', which",
        ),
        (
            "value",
            "image,age\na.png,1\nb.png,\nsub/c.png,3\n",
            "line 3 of '{csv}': column 'age' holds nothing",
        ),
        (
            "value",
            "image,age\na.png,1\nb.png,nan\nsub/c.png,3\n",
            "column 'age' holds 'nan', but needs a finite",
        ),
        (
            "value",
            "image,mass\na.png,1\nb.png,2\nsub/c.png,3\n",
            "has no column 'age' (its columns: image, mass)",
        ),
    ],
)
def test_mistakes(files, tmp_path, wanted, table, message):
    data = files(table)
    with pytest.raises(UserError) as raised:
        open_labelled(data, "train", wanted)
    assert message.format(csv=tmp_path / "labels.csv") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wanted", ["label", "labels"])
def test_a_class_that_is_not_among_the_names(files, tmp_path, wanted):
    data = files(f"image,{wanted}\na.png,dog\nb.png,dig\nsub/c.png,dog\n", classes="dog\ncat\n")
    with pytest.raises(UserError) as raised:
        open_labelled(data, "train", wanted)
    expected = (
        f"line 3 of '{tmp_path / 'labels.csv'}': class 'dig' is not in data.classes; did you mean 'dog'?"
    )
    assert str(raised.value).startswith(expected)


def test_a_missing_file_and_keys_that_do_not_fit(files, tmp_path):
    data = files("image,age\na.png,1\nb.png,2\nsub/c.png,3\n")
    with pytest.raises(UserError, match="must name at least one column, and none twice"):
        open_labelled(ConfigDict({**data, "targets": ("age", "age")}), "train", "value")
    with pytest.raises(UserError, match=r"is for the files of a folder, not for data.source 'digits'"):
        open_source(ConfigDict({**data, "source": "digits"}), "train", 0, "value")
    with pytest.raises(UserError, match=r"data\.train_per_class 2: these images have not one class each"):
        open_source(ConfigDict({**data, "train_per_class": 2}), "train", 0, "value")
    with pytest.raises(UserError, match=r"cannot read data\.labels .*no.csv.*: No such file"):
        csv_labels.read_table(str(tmp_path / "no.csv"))
