"""TFDS: records by index are those that TFDS itself reads, whichever files hold them."""

import io
import os
import shutil
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnx2_jax.data.sources.tfds import open_tfds, val_spec
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

FORMATS = ("tfrecord", "array_record")
SIZES = {"train": 50, "validation": 13, "test": 7}


class _Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Small JPEGs and PNGs. TFDS does not know the code, as where only the files were copied."""

    VERSION = tfds.core.Version("1.2.3")
    sizes: ClassVar = SIZES
    features: ClassVar = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "ox"]),
    }

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.sizes}

    def _generate_examples(self, split):
        rng = np.random.default_rng(len(split))
        for number in range(self.sizes[split]):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (5 + number % 7, 9, 3), np.uint8)
            Image.fromarray(pixels).save(file, "PNG" if number % 3 else "JPEG")
            file.seek(0)
            example = {"image": file, "label": number % 3, "id": number}
            yield number, {key: example[key] for key in self.features}


def builder_class(name, **attributes):
    return type(name, (_Pictures,), {"name": name, **attributes}, skip_registration=True)


def prepare(root, name, file_format="tfrecord", shards=3, **attributes):
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    builder = builder_class(name, **attributes)(data_dir=root, file_format=file_format)
    builder.download_and_prepare(download_config=config)
    return builder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "cnx2_jax"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The builders, by file format; their data directory is named after it."""
    root = tmp_path_factory.mktemp("tfds")
    return {kind: prepare(root / kind, "pictures", kind) for kind in FORMATS}


@pytest.fixture
def copied(prepared, tmp_path):
    """The TFRecord data set's directory, to be damaged."""
    shutil.copytree(prepared["tfrecord"].data_dir, tmp_path / "pictures" / "1.2.3")
    return tmp_path


def root_of(builder):
    return os.path.dirname(os.path.dirname(builder.data_dir))


def record(source, index):
    read = source.read(tf.constant(index, tf.int64))
    assert read["image"].shape == read["label"].shape == () and read["label"].dtype == tf.int32
    return read["image"].numpy(), int(read["label"])


def records(source):
    return [record(source, index) for index in range(source.num_records)]


def expected(builder, split):
    """What TFDS reads, in its order."""
    skip = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        examples = builder.as_data_source(split, decoders=skip)
    else:
        order = tfds.ReadConfig(interleave_cycle_length=1)
        examples = builder.as_dataset(split, decoders=skip, read_config=order, shuffle_files=False)
        examples = examples.as_numpy_iterator()
    return [(bytes(example["image"]), int(example["label"])) for example in examples]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "split",
    [
        *SIZES,
        "train[:90%]",
        "train[7:-3]",
        "validation[50%:]",
        "train[40:]+test+train[:3]",
        "train[1shard]",
        "all",
    ],
)
def test_records_are_those_of_tfds_in_its_order(prepared, kind, split):
    builder = prepared[kind]
    source = open_tfds(f"pictures:{split}", root_of(builder))
    assert source.class_names == ("cat", "dog", "ox")
    assert source.labels is None
    # TFDS's data sources do not know "all".
    parts = "+".join(builder.info.splits) if split == "all" else split
    assert records(source) == expected(builder, parts)
    assert len(set(records(source))) == source.num_records  # so that the order is tested too


def test_images_are_as_stored(prepared):
    for encoded, _ in records(open_tfds("pictures:test", root_of(prepared["tfrecord"]))):
        assert Image.open(io.BytesIO(encoded)).format in ("JPEG", "PNG")


def test_random_order_in_many_threads(prepared):
    streams = []
    order = np.random.default_rng(0).permutation(np.tile(np.arange(50), 20)).astype(np.int64)
    for builder in prepared.values():
        source = open_tfds("pictures:train", root_of(builder))
        dataset = tf.data.Dataset.from_tensor_slices(order).map(source.read, num_parallel_calls=8)
        assert dataset.element_spec == {
            "image": tf.TensorSpec([], tf.string),
            "label": tf.TensorSpec([], tf.int32),
        }
        streams.append([(one["image"], one["label"]) for one in dataset.as_numpy_iterator()])
        of_index = records(source)
        assert streams[-1] == [of_index[index] for index in order]
    assert streams[0] == streams[1]


def test_files_stay_open_no_longer_than_the_source(prepared):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else pytest.skip("needs /proc")
    for _ in range(3):
        source = open_tfds("pictures:train", root_of(prepared["tfrecord"]))
        assert len(os.listdir("/proc/self/fd")) == before + 3
        del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_describe_names_the_record_and_its_file(prepared):
    source = open_tfds("pictures:train", root_of(prepared["tfrecord"]))
    assert source.describe(17) == "pictures/1.2.3/train record 17 (pictures-train.tfrecord-00001-of-00003)"
    sliced = open_tfds("pictures:1.*.*:train[90%:]", root_of(prepared["array_record"]))
    assert sliced.describe(0) == (
        "pictures/1.2.3/train[90%:] record 0 (pictures-train.array_record-00002-of-00003)"
    )


def test_val_spec(prepared, tmp_path):
    root = root_of(prepared["tfrecord"])
    assert val_spec("pictures:train", root) == "pictures:validation"
    assert val_spec("pictures:1.2.3:train[:90%]", root) == "pictures:1.2.3:validation"
    assert val_spec("pictures:train + validation[:2]", root) == "pictures:test"
    assert val_spec("pictures:train+test+validation", root) is None
    assert val_spec("pictures:all", root) is None
    prepare(tmp_path, "two", sizes={"train": 4, "test": 3}, shards=1)
    prepare(tmp_path, "one", sizes={"train": 4}, shards=1)
    assert val_spec("two:train", str(tmp_path)) == "two:test"
    assert val_spec("two:test", str(tmp_path)) is None
    assert val_spec("one:train", str(tmp_path)) is None


def test_configs_versions_and_the_default_directory(prepared, tmp_path, monkeypatch):
    configs = [tfds.core.BuilderConfig(name=name) for name in ("a-b", "c.d")]
    kind = builder_class("many", BUILDER_CONFIGS=configs, sizes={"test": 5})
    for config in configs:
        kind(data_dir=tmp_path, config=config.name).download_and_prepare()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for spec in ("many/a-b:test", "many/c.d:1.2.3:test", "many:test"):
        assert open_tfds(spec, f"~/{tmp_path.name}").num_records == 5
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    assert open_tfds("many/a-b:test", "").num_records == 5


@pytest.mark.parametrize("kind", FORMATS)
def test_a_prepared_imagenet(tmp_path, kind):
    wnids = [f"n{number:08}" for number in range(1440764, 1440767)]
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=wnids)}
    builder = prepare(
        tmp_path, "imagenet2012", kind, features=features, sizes={"train": 20, "validation": 4}, shards=2
    )
    assert val_spec("imagenet2012:train", str(tmp_path)) == "imagenet2012:validation"
    for split in ("train", "validation"):
        source = open_tfds(f"imagenet2012:{split}", str(tmp_path))
        assert source.class_names == tuple(wnids)
        assert records(source) == expected(builder, split)


def test_the_index_is_cached_and_made_anew_when_damaged(copied, cache, monkeypatch):
    walks = []
    walk = sys.modules[open_tfds.__module__]._walk
    monkeypatch.setattr(
        f"{open_tfds.__module__}._walk", lambda path, *rest: walks.append(path) or walk(path, *rest)
    )

    def opened():
        """The records, and how many files were walked for them."""
        before = len(walks)
        return records(open_tfds("pictures:train", str(copied))), len(walks) - before

    known = set(cache.glob("*"))
    first, walked = opened()
    assert walked == 3
    (index,) = set(cache.glob("*")) - known
    assert opened() == (first, 0)
    good = index.read_bytes()
    for damaged in (b"", good[:-40], good[: len(good) // 2], b"\0" * len(good)):
        index.write_bytes(damaged)
        assert opened() == (first, 3)
        assert opened() == (first, 0)
    shard = next(copied.rglob("*train*00002-of*"))
    os.utime(shard, ns=(0, 0))
    assert opened() == (first, 3)
    # A file where the folder should be: no user may write there, root included.
    (copied / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(copied / "file"))
    assert opened() == opened() == (first, 3)


@pytest.mark.parametrize("cut", [1, 5, 10**9, -1])
def test_a_truncated_or_longer_shard_is_named(copied, cut):
    shard = next(copied.rglob("*train*00001-of*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: max(0, len(whole) - cut)] + b"more" * (cut < 0))
    whole_records = 0 if cut > len(whole) else 16 if cut < 0 else 15
    with pytest.raises(UserError, match=f"00001-of-00003' has {whole_records} whole records, not 16: "):
        open_tfds("pictures:train", str(copied))
    assert open_tfds("pictures:test", str(copied)).num_records == 7


def test_shards_with_other_counts_than_the_metadata_are_named(copied):
    assert open_tfds("pictures:train", str(copied)).num_records == 50  # and the index is cached
    info = next(copied.rglob("dataset_info.json"))
    info.write_text(info.read_text().replace('"16"', '"18"'))
    with pytest.raises(UserError, match="00001-of-00003' has 16 whole records, not 18: "):
        open_tfds("pictures:train", str(copied))


def test_a_missing_or_cut_array_record_is_named(prepared, tmp_path):
    shutil.copytree(root_of(prepared["array_record"]), tmp_path, dirs_exist_ok=True)
    shard = next(tmp_path.rglob("*train*00001-of*"))
    shard.write_bytes(shard.read_bytes()[:-70])
    with pytest.raises(UserError, match="00001-of-00003' has 0 whole records") as caught:
        open_tfds("pictures:train", str(tmp_path))
    assert "\n" not in str(caught.value)
    shard.unlink()
    with pytest.raises(UserError, match="00001-of-00003' has 0 whole records"):
        open_tfds("pictures:train", str(tmp_path))


def test_reading_a_damaged_record_raises_in_tensorflow(copied):
    source = open_tfds("pictures:train", str(copied))
    first = record(source, 0)
    shard = next(copied.rglob("*train*00001-of*"))
    whole = shard.read_bytes()
    for changed in (b"\1" + whole[1:], whole[:20], whole[:12] + b"\xff" * 30 + whole[42:]):
        shard.write_bytes(changed)
        with pytest.raises(tf.errors.OpError):
            record(source, 17)
        with pytest.raises(tf.errors.OpError):
            list(tf.data.Dataset.range(17, 18).map(source.read, num_parallel_calls=2))
        assert record(source, 0) == first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'tfds:' is not tfds:NAME"),
        ("pictures", "'tfds:pictures' is not tfds:NAME"),
        ("pictures:", "is not tfds:NAME"),
        ("pictures/:train", "is not tfds:NAME"),
        ("../pictures:train", "is not tfds:NAME"),
        (
            "pictures:trian",
            "'pictures/1.2.3' has no split 'trian'; did you mean 'train'.*; it has: .*validation",
        ),
        ("pictures:train+val[:3]", "has no split 'val'"),
        ("pictures:train[:9x]", r"no split 'train\[:9x\]' of 'pictures/1.2.3': .*; write as train"),
        ("pictures:train[:90%", "write as train"),
        ("pictures:train[:0]", "has no records|no split"),
        ("pictures:2.0.0:train", "'pictures:2.0.0' is not prepared in '{root}'; of pictures there is: 1.2.3"),
        ("pictures/other:train", "'pictures/other' is not prepared in '{root}'"),
        (
            "cifar11:train",
            "unknown data set 'cifar11', which is not in '{root}' either; did you mean 'cifar10",
        ),
        (
            "cifar10:train",
            "'cifar10' is not prepared in '{root}'; .* `tfds build cifar10 --data_dir={root}`$",
        ),
        (
            "imagenet2012:train",
            "`tfds build imagenet2012 .*` once its archives .* image-net.org",
        ),
    ],
)
@pytest.mark.parametrize("function", [open_tfds, val_spec])
def test_user_errors(prepared, function, spec, message):
    root = root_of(prepared["tfrecord"])
    if (function is val_spec and "split" in message) or "write as" in message:
        pytest.skip("val_spec does not look at the given split")
    with pytest.raises(UserError, match=message.format(root=root)) as caught:
        function(spec, root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"label": tfds.features.ClassLabel(num_classes=3)},
            "'odd/1.2.3' needs the features 'image'.* but has: label;",
        ),
        (
            {"image": tfds.features.Image(), "id": tfds.features.Scalar(np.int64)},
            "and 'label', of known classes, but has: ",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)},
            "and 'label', of known classes, but has: ",
        ),
    ],
)
def test_data_sets_without_images_or_labels(tmp_path, features, message):
    prepare(tmp_path, "odd", features=features, sizes={"train": 3}, shards=1)
    with pytest.raises(UserError, match=message):
        open_tfds("odd:train", str(tmp_path))


def test_classes_without_names_are_numbered(tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    prepare(tmp_path, "plain", features=features, sizes={"train": 3}, shards=1)
    assert open_tfds("plain:train", str(tmp_path)).class_names == ("0", "1", "2")


def test_other_formats_and_damaged_metadata(copied):
    info = next(copied.rglob("dataset_info.json"))
    good = info.read_text()
    info.write_text(good.replace('"tfrecord"', '"riegeli"'))
    with pytest.raises(UserError, match="format riegeli are not supported; use array_record"):
        open_tfds("pictures:train", str(copied))
    info.write_text(good[:-30])
    with pytest.raises(UserError, match="cannot load 'pictures'") as caught:
        open_tfds("pictures:train", str(copied))
    assert "\n" not in str(caught.value)


def test_more_files_than_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    root = prepare(tmp_path, "wide", shards=40, sizes={"train": 40})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd"))) if sys.platform == "linux" else 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, limits[1]))
    try:
        assert records(open_tfds("wide:train", str(tmp_path))) == expected(root, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class _Arrays(_Pictures, skip_registration=True):
    """Arrays of 16 bits as PNGs, and of floats of any size."""

    features: ClassVar = {
        "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }

    def _generate_examples(self, split):
        rng = np.random.default_rng(0)
        for number in range(4):
            array = (rng.random((5 + number, 7, self.features["image"].shape[-1])) * 65535).astype(
                self.features["image"].np_dtype
            )
            yield number, {"image": array, "label": number % 2}


@pytest.mark.parametrize(
    "image",
    [
        tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
        tfds.features.Tensor(shape=(None, None, 5), dtype=np.float32, encoding="zlib"),
    ],
    ids=["png", "tensor"],
)
def test_arrays_of_other_dtypes(tmp_path, image):
    features = {**_Arrays.features, "image": image}
    made = type("arrays", (_Arrays,), {"name": "arrays", "features": features}, skip_registration=True)
    builder = made(data_dir=tmp_path)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    order = tfds.ReadConfig(interleave_cycle_length=1)
    expected = builder.as_dataset("train", read_config=order, shuffle_files=False).as_numpy_iterator()
    source = open_tfds("arrays:train", str(tmp_path))
    field = source.fields["image"]
    for index, example in enumerate(expected):
        found = source.read(tf.constant(index, tf.int64))
        array = field.decode(found["image"]).numpy()
        assert array.dtype == image.np_dtype and np.array_equal(array, example["image"])
        assert int(found["label"]) == example["label"]
